/* The classes of bytes that `clmoe trace` tells apart: ASCII's, whatever the locale. */
#ifndef CLMOE_CLI_TRAIN_CLASSES_H
#define CLMOE_CLI_TRAIN_CLASSES_H

typedef enum byte_class {
    CLASS_LOWER,
    CLASS_UPPER,
    CLASS_DIGIT,
    CLASS_PUNCTUATION,
    CLASS_SPACE,   /* blank, \t, \v, \f, \r */
    CLASS_NEWLINE, /* \n */
    CLASS_OTHER,   /* controls, and all from 127 on: of UTF-8 what is not ASCII */
    BYTE_CLASSES
} byte_class;

byte_class class_of(unsigned char byte);

/* In reports and files. */
const char *class_name(byte_class class);

#endif
