/* The distinct voxels of distinct.py by hashing instead of NumPy's sort. Compiled and called as gather.c is. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define FIRST_BITS 12 /* of the number of slots: the table grows as voxels are found, to stay in the cache */

/* Find the slot of `voxel`: the one that has its position in `distinct`, plus one, or the free one for it. */
static inline uint32_t *find_slot(uint64_t voxel, uint64_t seed, uint32_t *slots, int bits, const uint64_t *distinct)
{
    uint64_t hash = voxel * seed;
    hash ^= hash >> 32;
    size_t slot = (size_t)((hash * 0x9E3779B97F4A7C15u) >> (64 - bits));
    while (slots[slot] && distinct[slots[slot] - 1] != voxel)
        slot = (slot + 1) & (((size_t)1 << bits) - 1);
    return slots + slot;
}

/* Find the distinct ones of `count` voxels of 8 bytes each. Returns their number.
 * Written: `distinct`, in order of first appearance; their frequencies; and `rows`, the position of each voxel in
 * `distinct`. Each has room for `count` items. `slots` is scratch memory for 2^most_bits items, at least twice
 * `count`: a hash table with linear probing, at most half full. `seed` is a random odd number, so that nobody can
 * prepare voxels that all begin at one slot.
 * A change of the arguments must change the number in the name, so that a library built before is not called. */
uint32_t find_distinct_1(const char *voxels, size_t count, uint64_t seed, uint32_t *slots, int most_bits,
                         uint64_t *distinct, uint32_t *frequency, uint32_t *rows)
{
    int bits = most_bits < FIRST_BITS ? most_bits : FIRST_BITS;
    uint32_t found = 0;
    memset(slots, 0, sizeof *slots << bits);
    for (size_t index = 0; index < count; index++) {
        uint64_t voxel;
        memcpy(&voxel, voxels + sizeof voxel * index, sizeof voxel); /* may be unaligned */
        uint32_t *slot = find_slot(voxel, seed, slots, bits, distinct);
        if (!*slot) {
            if (2 * (size_t)found >> bits && bits < most_bits) {
                bits++;
                memset(slots, 0, sizeof *slots << bits);
                for (uint32_t row = 0; row < found; row++)
                    *find_slot(distinct[row], seed, slots, bits, distinct) = row + 1;
                slot = find_slot(voxel, seed, slots, bits, distinct);
            }
            distinct[found] = voxel;
            frequency[found] = 0;
            *slot = ++found;
        }
        rows[index] = *slot - 1;
        frequency[rows[index]]++;
    }
    return found;
}
