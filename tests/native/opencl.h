/*
 * OpenCL C's own names for kernels that are compiled as native code: the types and functions our
 * kernels use, on top of the compiler's. Work-item functions are in run.c. Included before a
 * kernel.
 */
#ifndef NATIVE_OPENCL_H
#define NATIVE_OPENCL_H

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;

#define INFINITY             __builtin_inff()
#define NAN                  __builtin_nanf("")
#define CLK_LOCAL_MEM_FENCE  1
#define CLK_GLOBAL_MEM_FENCE 2
#define prefetch(p, count)   ((void)(p), (void)(count))

size_t get_local_id(uint d);
size_t get_group_id(uint d);
size_t get_local_size(uint d);
size_t get_num_groups(uint d);
size_t get_global_id(uint d);
size_t get_global_size(uint d);
size_t get_global_offset(uint d);
void barrier(uint flags);

#define BUILTIN static inline __attribute__((overloadable, unused))

/* ---- Scalars -------------------------------------------------------------------------------- */

/* Anything of the same size. */
#define AS(type, n, v) __builtin_astype((v), type##n)
#define as_uint(v)     __builtin_astype((v), uint)
#define as_float(v)    __builtin_astype((v), float)
#define as_int(v)      __builtin_astype((v), int)
#define as_int16(v)    AS(int, 16, v)
#define as_ushort8(v)  AS(ushort, 8, v)
#define as_uint4(v)    AS(uint, 4, v)
#define as_uint8(v)    AS(uint, 8, v)
#define as_uint16(v)   AS(uint, 16, v)
#define as_float4(v)   AS(float, 4, v)
#define as_float8(v)   AS(float, 8, v)
#define as_float16(v)  AS(float, 16, v)

#define SCALAR_UNARY(name)                                                                         \
    BUILTIN float name(float v) {                                                                  \
        return __builtin_##name##f(v);                                                             \
    }
SCALAR_UNARY(exp)
SCALAR_UNARY(log)
SCALAR_UNARY(log1p)
SCALAR_UNARY(tanh)
SCALAR_UNARY(erf)
SCALAR_UNARY(erfc)
SCALAR_UNARY(ceil)
SCALAR_UNARY(sqrt)
SCALAR_UNARY(fabs)

BUILTIN float pow(float base, float exponent) {
    return __builtin_powf(base, exponent);
}
BUILTIN float fmax(float a, float b) {
    return __builtin_fmaxf(a, b);
}
BUILTIN float fmin(float a, float b) {
    return __builtin_fminf(a, b);
}
BUILTIN float ldexp(float v, int exponent) {
    return __builtin_ldexpf(v, exponent);
}
BUILTIN int ilogb(float v) {
    return __builtin_ilogbf(v);
}
BUILTIN float cospi(float v) {
    return (float)__builtin_cos(3.14159265358979323846 * (double)v);
}
BUILTIN uint mul_hi(uint a, uint b) {
    return (uint)((ulong)a * b >> 32);
}
BUILTIN uint popcount(uint v) {
    return (uint)__builtin_popcount(v);
}
BUILTIN uint add_sat(uint a, uint b) {
    return b > 0xFFFFFFFFu - a ? 0xFFFFFFFFu : a + b;
}
/* Work-items take turns. */
#define atomic_inc(p)    ((*(p))++)
#define atomic_add(p, v) (*(p) += (v))
#define atomic_or(p, v)  (*(p) |= (v))
#define atomic_max(p, v) (*(p) = max(*(p), v))
BUILTIN float fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
BUILTIN int isnan(float v) {
    return __builtin_isnan(v);
}
BUILTIN int isfinite(float v) {
    return __builtin_isfinite(v);
}

#define MIN_MAX(type)                                                                              \
    BUILTIN type min(type a, type b) {                                                             \
        return b < a ? b : a;                                                                      \
    }                                                                                              \
    BUILTIN type max(type a, type b) {                                                             \
        return a < b ? b : a;                                                                      \
    }                                                                                              \
    BUILTIN type clamp(type v, type low, type high) {                                              \
        return min(max(v, low), high);                                                             \
    }
MIN_MAX(int)
MIN_MAX(uint)
MIN_MAX(ulong)
MIN_MAX(float)

/* ---- Vectors -------------------------------------------------------------------------------- */

#define VECTOR_UNARY(name, n)                                                                      \
    BUILTIN float##n name(float##n v) {                                                            \
        for (int i = 0; i < n; i++)                                                                \
            v[i] = name(v[i]);                                                                     \
        return v;                                                                                  \
    }

#define CONVERT(to, from, n)                                                                       \
    BUILTIN to##n convert_##to##n(from##n v) {                                                     \
        return __builtin_convertvector(v, to##n);                                                  \
    }

/* Pointers to different address spaces are different types. */
#define LOAD_STORE(type, n, space)                                                                 \
    BUILTIN type##n vload##n(size_t at, const space type *p) {                                     \
        type##n v;                                                                                 \
        for (int i = 0; i < n; i++)                                                                \
            v[i] = p[at * n + i];                                                                  \
        return v;                                                                                  \
    }                                                                                              \
    BUILTIN void vstore##n(type##n v, size_t at, space type *p) {                                  \
        for (int i = 0; i < n; i++)                                                                \
            p[at * n + i] = v[i];                                                                  \
    }

#define LOAD_STORE_SPACES(type, n)                                                                 \
    LOAD_STORE(type, n, __global)                                                                  \
    LOAD_STORE(type, n, __local)                                                                   \
    LOAD_STORE(type, n, __private)

/* f16: through the bits. */
BUILTIN float half_to_float(ushort bits) {
    uint sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31)
        return as_float(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0)
        return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

BUILTIN ushort float_to_half(float v) {
    uint bits = as_uint(v), sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
    if (rest > 0x7F800000u)
        return (ushort)(sign | 0x7E00u);
    if (rest >= 0x477FF000u) /* 65520 rounds up to infinity */
        return (ushort)(sign | 0x7C00u);
    if (rest < 0x38800000u) /* below 2^-14: adding 0.5 rounds at 2^-24 */
        return (ushort)(sign | (as_uint(as_float(rest) + 0.5f) - 0x3F000000u));
    return (ushort)(sign | (rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1)) >> 13);
}

#define HALF_BITS(space, p, i) (((const space ushort *)(p))[i])

#define HALVES_IN(n, space)                                                                        \
    BUILTIN float##n vload_half##n(size_t at, const space half *p) {                               \
        float##n v;                                                                                \
        for (int i = 0; i < n; i++)                                                                \
            v[i] = half_to_float(HALF_BITS(space, p, at * n + i));                                 \
        return v;                                                                                  \
    }
#define HALVES_OUT(n, space)                                                                       \
    BUILTIN void vstore_half##n##_rte(float##n v, size_t at, space half *p) {                      \
        for (int i = 0; i < n; i++)                                                                \
            ((space ushort *)p)[at * n + i] = float_to_half(v[i]);                                 \
    }

#define VECTORS(n)                                                                                 \
    typedef float float##n __attribute__((ext_vector_type(n)));                                    \
    typedef int int##n __attribute__((ext_vector_type(n)));                                        \
    typedef uint uint##n __attribute__((ext_vector_type(n)));                                      \
    typedef long long##n __attribute__((ext_vector_type(n)));                                      \
    typedef ulong ulong##n __attribute__((ext_vector_type(n)));                                    \
    typedef ushort ushort##n __attribute__((ext_vector_type(n)));                                  \
    VECTOR_UNARY(exp, n)                                                                           \
    VECTOR_UNARY(tanh, n)                                                                          \
    VECTOR_UNARY(erf, n)                                                                           \
    VECTOR_UNARY(erfc, n)                                                                          \
    VECTOR_UNARY(log, n)                                                                           \
    VECTOR_UNARY(log1p, n)                                                                         \
    VECTOR_UNARY(fabs, n)                                                                          \
    VECTOR_UNARY(sqrt, n)                                                                          \
    BUILTIN float##n fmax(float##n a, float##n b) {                                                \
        for (int i = 0; i < n; i++)                                                                \
            a[i] = fmax(a[i], b[i]);                                                               \
        return a;                                                                                  \
    }                                                                                              \
    BUILTIN float##n fmin(float##n a, float##n b) {                                                \
        for (int i = 0; i < n; i++)                                                                \
            a[i] = fmin(a[i], b[i]);                                                               \
        return a;                                                                                  \
    }                                                                                              \
    BUILTIN int##n isfinite(float##n v) {                                                          \
        int##n is;                                                                                 \
        for (int i = 0; i < n; i++)                                                                \
            is[i] = -isfinite(v[i]);                                                               \
        return is;                                                                                 \
    }                                                                                              \
    MIN_MAX(uint##n)                                                                               \
    BUILTIN float##n fma(float##n a, float##n b, float##n c) {                                     \
        for (int i = 0; i < n; i++)                                                                \
            c[i] = fma(a[i], b[i], c[i]);                                                          \
        return c;                                                                                  \
    }                                                                                              \
    BUILTIN uint##n select(uint##n a, uint##n b, uint##n choose) {                                 \
        for (int i = 0; i < n; i++)                                                                \
            a[i] = choose[i] >> 31 ? b[i] : a[i];                                                  \
        return a;                                                                                  \
    }                                                                                              \
    BUILTIN float##n select(float##n a, float##n b, int##n choose) {                               \
        for (int i = 0; i < n; i++)                                                                \
            a[i] = choose[i] < 0 ? b[i] : a[i];                                                    \
        return a;                                                                                  \
    }                                                                                              \
    CONVERT(uint, ushort, n)                                                                       \
    CONVERT(ushort, uint, n)                                                                       \
    LOAD_STORE_SPACES(float, n)                                                                    \
    LOAD_STORE_SPACES(ushort, n)                                                                   \
    LOAD_STORE_SPACES(int, n)                                                                      \
    LOAD_STORE_SPACES(uint, n)                                                                     \
    HALVES_IN(n, __global)                                                                         \
    HALVES_IN(n, __private)                                                                        \
    HALVES_OUT(n, __global)                                                                        \
    HALVES_OUT(n, __private)
VECTORS(2)
VECTORS(4)
VECTORS(8)
VECTORS(16)

BUILTIN float dot(float2 a, float2 b) {
    return a.x * b.x + a.y * b.y;
}
BUILTIN float dot(float4 a, float4 b) {
    return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

BUILTIN float vload_half(size_t at, const __global half *p) {
    return half_to_float(HALF_BITS(__global, p, at));
}
BUILTIN void vstore_half_rte(float v, size_t at, __global half *p) {
    ((__global ushort *)p)[at] = float_to_half(v);
}

#endif
