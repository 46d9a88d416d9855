# What is looked for on the machine: needed, or left out with a word where it is missing.

# need(FOUND NAME PACKAGES): an error that says what to install.
function(need found name packages)
    if(NOT found)
        message(FATAL_ERROR "${name} is missing: install ${packages}")
    endif()
endfunction()

# optional(SWITCH FOUND NAME PACKAGES WHAT): SWITCH becomes ON or OFF; AUTO is ON where it is found.
function(optional switch found name packages what)
    if("${${switch}}" STREQUAL "AUTO" AND found)
        set(${switch} ON PARENT_SCOPE)
    elseif("${${switch}}" STREQUAL "AUTO")
        message(STATUS "no ${name}: ${what} left out; to have it, install ${packages}")
        set(${switch} OFF PARENT_SCOPE)
    elseif(${switch} AND NOT found)
        message(FATAL_ERROR "${switch} is ON, but ${name} is missing: install ${packages}, or configure "
                            "with -D${switch}=OFF")
    endif()
endfunction()

find_package(Threads REQUIRED)
find_package(PkgConfig QUIET)
need("${PKG_CONFIG_FOUND}" pkg-config "pkg-config (Debian, Ubuntu) or pkgconf-pkg-config (Fedora)")
find_package(OpenCL QUIET)
need("${OpenCL_FOUND}" "OpenCL (headers and loader)"
     "opencl-headers and ocl-icd-opencl-dev (Debian, Ubuntu) or ocl-icd-devel (Fedora)")
pkg_check_modules(jansson QUIET IMPORTED_TARGET jansson>=2.12)
need("${jansson_FOUND}" "jansson 2.12 or newer"
     "libjansson-dev (Debian, Ubuntu) or jansson-devel (Fedora)")
find_package(CLBlast QUIET)
optional(CLMOE_WITH_CLBLAST "${CLBlast_FOUND}" CLBlast
         "libclblast-dev (Debian, Ubuntu) or clblast-devel (Fedora)" "the engine clblast is")
pkg_check_modules(cmocka QUIET IMPORTED_TARGET cmocka)
optional(CLMOE_BUILD_TESTS "${cmocka_FOUND}" cmocka
         "libcmocka-dev (Debian, Ubuntu) or libcmocka-devel (Fedora)" "the tests are")
