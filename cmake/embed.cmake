# Writes OUTPUT, a C file with every file of FILES (separated by '|') as a byte array; a file's name is
# its path from ROOT.
# Run as: cmake -DROOT=. -DFILES=cl/a.cl|cl/b.clh -DTABLE=name -DHEADER=sources.h -DOUTPUT=name.c -P embed.cmake
# HEADER declares the array TABLE.
string(REPLACE "|" ";" files "${FILES}")
set(arrays "")
set(table "")
foreach(file IN LISTS files)
    file(RELATIVE_PATH name "${ROOT}" "${file}")
    string(MAKE_C_IDENTIFIER "source_${name}" id)
    file(READ "${file}" hex HEX)
    string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
    string(APPEND arrays "static const unsigned char ${id}[] = {${bytes}0x00};\n")
    string(APPEND table "    {\"${name}\", (const char *)${id}},\n")
endforeach()
file(WRITE "${OUTPUT}" "#include \"${HEADER}\"\n\n${arrays}\nconst kernel_source ${TABLE}[] = {\n${table}    {0, 0},\n};\n")
