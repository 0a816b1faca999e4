/* The gather of gather_cpu.py in one pass instead of NumPy's six. The installation compiles it if there is a
 * compiler. gather_cpu.py calls it by ctypes, so that it needs no Python headers. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define ITEM 16 /* bytes of a row: float32 at four redshifts */

static inline uint32_t gather(const uint8_t *const *planes, const int count, size_t voxels,
                              const char *restrict table, uint32_t rows, char *restrict out)
{
    uint32_t highest = 0;
    for (size_t voxel = 0; voxel < voxels; voxel++) {
        uint32_t row = 0;
        for (int plane = 0; plane < count; plane++)
            row |= (uint32_t)planes[plane][voxel] << (8 * plane);
        highest = row > highest ? row : highest;
        /* The caller checks the highest row afterwards; until then, nothing is read out of bounds. */
        const char *item = table + (size_t)ITEM * (row < rows ? row : 0);
#ifdef __SSE__
        /* Bypass the caches, which a volume does not fit in, so that no line is read before it is written. */
        _mm_stream_ps((float *)(out + ITEM * voxel), _mm_loadu_ps((const float *)item));
#else
        memcpy(out + ITEM * voxel, item, ITEM);
#endif
    }
#ifdef __SSE__
    _mm_sfence();
#endif
    return highest;
}

/* Copy a row of `table` to `out` for each voxel. `planes` are the bytes of the row indices, lowest first; `rows` is
 * the length of the table, at least 1; `out` is aligned to 16 bytes. Returns the highest row index.
 * A change of the arguments must change the number in the name, so that a library built before is not called. */
uint32_t gather_rows_1(const uint8_t *const *planes, int count, size_t voxels, const char *table,
                     uint32_t rows, char *out)
{
    /* Separate loops for the usual numbers of planes. */
    switch (count) {
    case 1:
        return gather(planes, 1, voxels, table, rows, out);
    case 2:
        return gather(planes, 2, voxels, table, rows, out);
    default:
        return gather(planes, count, voxels, table, rows, out);
    }
}
