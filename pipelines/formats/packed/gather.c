/* What gather_cpu.py does with numpy in six passes, in one. setup builds it where there is a compiler, and
 * gather_cpu.py calls it by ctypes, so that it needs nothing of Python's. */
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
        /* The caller looks at the highest row when all is done; until then, nothing out of bounds. */
        const char *item = table + (size_t)ITEM * (row < rows ? row : 0);
#ifdef __SSE__
        /* Past the caches, which a volume does not fit in, so that no line of it is read to be written. */
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

/* Copy the row of `table` whose number's bytes are `planes`, lowest first, to `out` for each voxel. `rows` are
 * in the table, at least one; `out` is aligned to 16 bytes. Returns the highest number.
 * With other arguments its name is to have another number, so that nobody calls one that was built before. */
uint32_t gather_rows_1(const uint8_t *const *planes, int count, size_t voxels, const char *table,
                     uint32_t rows, char *out)
{
    /* Loops of their own for the numbers of planes that samples have. */
    switch (count) {
    case 1:
        return gather(planes, 1, voxels, table, rows, out);
    case 2:
        return gather(planes, 2, voxels, table, rows, out);
    default:
        return gather(planes, count, voxels, table, rows, out);
    }
}
