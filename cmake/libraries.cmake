# libclmoe.so and libclmoe.a from clmoe_objects, and what an application needs to find them.
include(CMakePackageConfigHelpers)

# Both libraries, or the one that BUILD_SHARED_LIBS says where it is given.
set(libraries clmoe clmoe_static)
if(DEFINED BUILD_SHARED_LIBS)
    set(libraries clmoe)
    if(NOT BUILD_SHARED_LIBS)
        set(libraries clmoe_static)
    endif()
endif()

# What links to either, and what clmoe.pc asks for: all of it where there is no shared library.
set(pc_requires OpenCL)
set(pc_requires_private jansson)
set(pc_libs "")
set(pc_libs_private "-pthread -lm")
if(CLMOE_WITH_CLBLAST)
    string(APPEND pc_requires_private " clblast")
endif()
if(NOT clmoe IN_LIST libraries)
    string(APPEND pc_requires " ${pc_requires_private}")
    set(pc_libs " ${pc_libs_private}")
    set(pc_requires_private "")
    set(pc_libs_private "")
endif()

if(clmoe IN_LIST libraries)
    add_library(clmoe SHARED $<TARGET_OBJECTS:clmoe_objects>)
    set_target_properties(clmoe PROPERTIES VERSION ${PROJECT_VERSION}
                          SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
                          LINKER_LANGUAGE C)
    target_link_libraries(clmoe PUBLIC OpenCL::OpenCL
                          PRIVATE PkgConfig::jansson Threads::Threads m
                          $<$<BOOL:${CLMOE_WITH_CLBLAST}>:clblast>)
endif()

# An archive has no hidden names: join its objects into one and make their hidden names local. The
# compiler joins for the same target and with the same root as it compiles, without the run-time
# libraries of sanitizers and coverage, which belong to the program, and without LTO: that of the
# objects is off, for names can be made local in machine code alone.
if(clmoe_static IN_LIST libraries)
    separate_arguments(join_flags NATIVE_COMMAND "${CMAKE_C_COMPILER_ARG1} ${CMAKE_C_FLAGS}")
    list(FILTER join_flags EXCLUDE REGEX "^(-fsanitize|-fprofile|--?coverage|-f(no-)?(fat-)?lto)")
    if(CMAKE_C_COMPILER_TARGET AND CMAKE_C_COMPILE_OPTIONS_TARGET)
        list(APPEND join_flags ${CMAKE_C_COMPILE_OPTIONS_TARGET}${CMAKE_C_COMPILER_TARGET})
    endif()
    if(CMAKE_SYSROOT AND CMAKE_C_COMPILE_OPTIONS_SYSROOT)
        list(APPEND join_flags ${CMAKE_C_COMPILE_OPTIONS_SYSROOT}${CMAKE_SYSROOT})
    endif()
    set(archive_object ${PROJECT_BINARY_DIR}/clmoe_archive.o)
    add_custom_command(
        OUTPUT ${archive_object}
        COMMAND ${CMAKE_C_COMPILER} ${join_flags} -r -nostdlib -o ${archive_object}
                $<TARGET_OBJECTS:clmoe_objects>
        COMMAND ${CMAKE_OBJCOPY} --localize-hidden ${archive_object}
        DEPENDS clmoe_objects $<TARGET_OBJECTS:clmoe_objects>
        COMMENT "Joining the objects of libclmoe.a"
        COMMAND_EXPAND_LISTS VERBATIM)
    add_library(clmoe_static STATIC ${archive_object})
    set_target_properties(clmoe_static PROPERTIES OUTPUT_NAME clmoe LINKER_LANGUAGE C)
    target_link_libraries(clmoe_static INTERFACE OpenCL::OpenCL Threads::Threads jansson m)
    if(CLMOE_WITH_CLBLAST)
        target_link_libraries(clmoe_static INTERFACE $<BUILD_INTERFACE:clblast>
                              $<INSTALL_INTERFACE:clblast>)
    endif()
endif()

foreach(library IN LISTS libraries)
    add_library(clmoe::${library} ALIAS ${library})
    target_include_directories(${library} INTERFACE
        $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
        $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
endforeach()
if(NOT clmoe IN_LIST libraries)
    add_library(clmoe::clmoe ALIAS clmoe_static) # the one that there is
endif()

if(NOT CLMOE_INSTALL)
    return()
endif()
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/clmoe)
install(TARGETS ${libraries} EXPORT clmoeTargets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/clmoe DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES LICENSE README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/clmoe)
install(DIRECTORY docs DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/clmoe)
install(EXPORT clmoeTargets NAMESPACE clmoe:: DESTINATION ${package_dir})

configure_package_config_file(cmake/clmoeConfig.cmake.in ${PROJECT_BINARY_DIR}/clmoeConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/clmoeConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/clmoeConfig.cmake ${PROJECT_BINARY_DIR}/clmoeConfigVersion.cmake
        DESTINATION ${package_dir})

# The prefix of clmoe.pc follows from where the file lies, so that an installed tree can be moved.
set(pc_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH pc_to_prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(clmoe.pc.in clmoe.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/clmoe.pc DESTINATION ${pc_dir})
