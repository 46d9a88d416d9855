# embed_kernels(TARGET TABLE HEADER FILE...): the target has the files, named from this directory, as an
# array TABLE of kernel_source, which HEADER declares.
function(embed_kernels target table header)
    set(output ${CMAKE_CURRENT_BINARY_DIR}/${table}.c)
    set(script ${PROJECT_SOURCE_DIR}/cmake/embed.cmake)
    list(JOIN ARGN "|" files)
    add_custom_command(
        OUTPUT ${output}
        COMMAND ${CMAKE_COMMAND} -DROOT=${CMAKE_CURRENT_SOURCE_DIR} "-DFILES=${files}" -DTABLE=${table}
                -DHEADER=${PROJECT_SOURCE_DIR}/${header} -DOUTPUT=${output} -P ${script}
        DEPENDS ${ARGN} ${script}
        COMMENT "Embedding ${table}"
        VERBATIM)
    target_sources(${target} PRIVATE ${output})
endfunction()
