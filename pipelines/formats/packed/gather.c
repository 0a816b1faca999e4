/* The gather of gather_cpu.py in one pass. The installation compiles it if there is a compiler. gather_cpu.py calls it
 * by ctypes, so that it needs no Python headers. A change of a function's arguments must change the number in its name,
 * so that a library built before is not called. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define ITEM 16    /* bytes of a row: float32 at four redshifts */
#define ESCAPE 255 /* symbol of a voxel whose row is among the escapes */
#define GROUP 16   /* voxels that are handled without a branch between them */

typedef size_t group_function(const uint8_t *symbols, const uint32_t *escapes, uint32_t *rows);

static inline void copy(char *restrict out, const char *restrict table, size_t row)
{
#ifdef __x86_64__
    /* Bypass the caches, which a volume does not fit in, so that no line is read before it is written. */
    _mm_stream_ps((float *)out, _mm_loadu_ps((const float *)(table + ITEM * row)));
#else
    memcpy(out, table + ITEM * row, ITEM);
#endif
}

/* Write the rows of GROUP symbols, with GROUP readable `escapes`; return how many of these were used. One in eight
 * symbols is ESCAPE, so that a branch for each of them would often be mispredicted. */
static inline size_t group_rows(const uint8_t *symbols, const uint32_t *escapes, uint32_t *rows)
{
    size_t used = 0;
    for (int at = 0; at < GROUP; at++) {
        uint32_t escaped = symbols[at] == ESCAPE;
        rows[at] = symbols[at] + (escapes[used] & -escaped);
        used += escaped;
    }
    return used;
}

/* Gather whole groups as long as GROUP escapes are left before `end`; move `escapes` past those used, and return the
 * number of voxels gathered. */
static inline size_t gather_groups(const uint8_t *symbols, size_t voxels, const uint32_t **escapes,
                                   const uint32_t *end, const char *table, char *out, group_function *group)
{
    size_t voxel = 0;
    const uint32_t *next = *escapes;
    for (; voxel + GROUP <= voxels && end - next >= GROUP; voxel += GROUP) {
        uint32_t rows[GROUP];
        next += group(symbols + voxel, next, rows);
        for (int at = 0; at < GROUP; at++)
            copy(out + ITEM * (voxel + at), table, rows[at]);
    }
    *escapes = next;
    return voxel;
}

static size_t gather_plain(const uint8_t *symbols, size_t voxels, const uint32_t **escapes, const uint32_t *end,
                           const char *table, char *out)
{
    return gather_groups(symbols, voxels, escapes, end, table, out, group_rows);
}

#ifdef __x86_64__
__attribute__((target("avx512f,popcnt"))) static inline size_t
group_rows_avx512(const uint8_t *symbols, const uint32_t *escapes, uint32_t *rows)
{
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)symbols));
    __mmask16 escaped = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(ESCAPE));
    __m512i added = _mm512_maskz_expand_epi32(escaped, _mm512_loadu_si512(escapes));
    _mm512_storeu_si512(rows, _mm512_add_epi32(wide, added));
    return (size_t)_mm_popcnt_u32(escaped);
}

__attribute__((target("avx512f,popcnt"))) static size_t gather_avx512(const uint8_t *symbols, size_t voxels,
                                                                      const uint32_t **escapes, const uint32_t *end,
                                                                      const char *table, char *out)
{
    return gather_groups(symbols, voxels, escapes, end, table, out, group_rows_avx512);
}
#endif

static int gather_escaped(const uint8_t *symbols, size_t voxels, const uint32_t *escapes, size_t count,
                          const char *table, uint32_t rows, char *out)
{
    uint32_t highest = 0;
    for (size_t escape = 0; escape < count; escape++)
        highest = escapes[escape] > highest ? escapes[escape] : highest;
    if (rows <= ESCAPE || highest >= rows - ESCAPE)
        return 0;
    const uint32_t *end = escapes + count;
    size_t voxel;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f"))
        voxel = gather_avx512(symbols, voxels, &escapes, end, table, out);
    else
#endif
        voxel = gather_plain(symbols, voxels, &escapes, end, table, out);
    for (; voxel < voxels; voxel++) {
        uint32_t row = symbols[voxel];
        if (row == ESCAPE) {
            if (escapes == end)
                return 0;
            row += *escapes++;
        }
        copy(out + ITEM * voxel, table, row);
    }
    return escapes == end;
}

static int gather_symbols(const uint8_t *symbols, size_t voxels, const char *table, uint32_t rows, char *out)
{
    uint8_t highest = 0;
    for (size_t voxel = 0; voxel < voxels; voxel++)
        highest = symbols[voxel] > highest ? symbols[voxel] : highest;
    if (highest >= rows)
        return 0;
    for (size_t voxel = 0; voxel < voxels; voxel++)
        copy(out + ITEM * voxel, table, symbols[voxel]);
    return 1;
}

/* Copy a row of `table` to `out` for each voxel. `symbols` are the rows; or if `escapes` is not NULL, ESCAPE stands for
 * the next of the `count` escapes, plus ESCAPE. `rows` is the length of the table; `out` is aligned to 16 bytes.
 * Returns 1; or 0 if a row is beyond the table or the escapes are not as many as the symbols for them. Nothing is
 * accessed out of bounds. */
int gather_rows_2(const uint8_t *symbols, size_t voxels, const uint32_t *escapes, size_t count, const char *table,
                  uint32_t rows, char *out)
{
    int valid = escapes ? gather_escaped(symbols, voxels, escapes, count, table, rows, out)
                        : gather_symbols(symbols, voxels, table, rows, out);
#ifdef __x86_64__
    _mm_sfence();
#endif
    return valid;
}

/* Join the `count` bytes of each number, of which `planes` has all lowest ones, all second ones, .... */
void join_planes_1(const uint8_t *const *planes, int count, size_t numbers, uint32_t *out)
{
    for (size_t number = 0; number < numbers; number++)
        out[number] = planes[0][number];
    for (int plane = 1; plane < count; plane++)
        for (size_t number = 0; number < numbers; number++)
            out[number] |= (uint32_t)planes[plane][number] << (8 * plane);
}
