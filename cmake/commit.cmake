# Writes OUTPUT, a header with the commit of SOURCE as CLMOE_COMMIT, or VERSION where there is none.
# Run as: cmake -DSOURCE=dir -DVERSION=1.2.3 -DOUTPUT=commit.h -P commit.cmake
set(commit "")
find_program(git git)
if(git)
    execute_process(COMMAND ${git} -C ${SOURCE} rev-parse --show-prefix OUTPUT_VARIABLE prefix
                    RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT failed AND prefix STREQUAL "") # not a copy inside another project's repository
        execute_process(COMMAND ${git} -C ${SOURCE} describe --always --dirty
                        OUTPUT_VARIABLE commit ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    endif()
endif()
if(commit STREQUAL "")
    set(commit ${VERSION})
endif()
file(CONFIGURE OUTPUT ${OUTPUT} CONTENT "#define CLMOE_COMMIT \"${commit}\"\n") # only if it changed
