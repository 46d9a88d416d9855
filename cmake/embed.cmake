# Writes OUTPUT, a C file with every kernel source of FILES (separated by '|') as a byte array.
# Run as: cmake -DFILES=a.cl|b.clh -DOUTPUT=kernels.c -P embed.cmake
string(REPLACE "|" ";" files "${FILES}")
set(arrays "")
set(table "")
foreach(file IN LISTS files)
    get_filename_component(name "${file}" NAME)
    string(MAKE_C_IDENTIFIER "source_${name}" id)
    file(READ "${file}" hex HEX)
    string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
    string(APPEND arrays "static const unsigned char ${id}[] = {${bytes}0x00};\n")
    string(APPEND table "    {\"${name}\", (const char *)${id}},\n")
endforeach()
file(WRITE "${OUTPUT}" "#include \"sources.h\"\n\n${arrays}\nconst kernel_source kernel_sources[] = {\n${table}    {0, 0},\n};\n")
