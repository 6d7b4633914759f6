// What the 4-bit codecs have in common: eight codes a word, the earlier of two in the high half of its byte, and a
// nearest value found with one load. Bucket k = sign, exponent and two bits of the mantissa of y holds at most one
// midpoint, so with
//   E[k] = (code at the bucket's start << 24) + 0xFFFFFF - (midpoint << 3 & 0xFFFFFF) - (k << 24)
// the sum (bits(y) << 3) + E[k] carries into byte 3 exactly when |y| > midpoint. Codes that fall as |y| grows are
// stored complemented, with bit 7 as the mark.
struct nibbles {
    static constexpr int WORDS = 1024 + 509;  // buckets of 0 .. 1, and as many with a sign
    template <class T> HD static uint32_t find(float y, const T& t) {
        uint32_t w = bits(y);
        return (w << 3) + t.word(w >> 21);
    }
    HD static uint32_t bytes(const uint32_t* q, uint32_t pick) {  // of every other word the byte that `pick` takes
        return byte_perm(byte_perm(q[0], q[2], pick), byte_perm(q[4], q[6], pick), 0x5410);
    }
    HD static uint32_t unmark(uint32_t c) { return (c ^ byte_perm(c, 0, 0xBA98)) & 0x0F0F0F0Fu; }
    HD static uint32_t join(uint32_t even, uint32_t odd) { return (even << 4) + odd; }
    // code k in byte k / 2
    HD static uint32_t split(uint32_t word, int k) { return (k & 1 ? word : word >> 4) & 0x0F0F0F0Fu; }
    template <class T> HD static uint32_t nearest(const float* x, float inv, const T& t) {
        uint32_t q[8];
        for (int k = 0; k < 8; k++) q[k] = find(mul(x[k], inv), t);
        return join(unmark(bytes(q, 0x0073)), unmark(bytes(q + 1, 0x0073)));
    }
};
