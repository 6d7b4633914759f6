// The states of a rule, each behind its codec, as a warp holds a tile of them: eight neighbouring elements a lane.

// ---- tables of codecs in shared memory: values 32 times over, so that no two lanes meet in a bank ----

// VALUES: offset of a column of values, a row of 256 bytes a code; WORDS: offset of an encode table.
template <uint32_t VALUES, uint32_t WORDS> struct Tables {
    const char* shared;
    uint32_t lane4;
    HD float value(uint32_t word, int k) const {
        uint32_t at = byte_perm(word, lane4, 0x5504u | k << 4);  // code in byte 1, 4 * lane in byte 0
        return *(const float*)(shared + VALUES + at);
    }
    HD uint32_t word(uint32_t i) const { return ((const uint32_t*)(shared + WORDS))[i]; }
};
struct Shared {  // all of them
    const char* at;
    uint32_t lane4;
    template <class S> HD Tables<S::VALUES, S::WORDS> of() const { return {at, lane4}; }
};

// ---- the largest magnitude of a block, NaN above all ----

HD float larger_magnitude(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(magnitude(a)), "f"(magnitude(b)));
    return r;
#else
    return real(max(bits(a) & 0x7FFFFFFFu, bits(b) & 0x7FFFFFFFu));
#endif
}
HD uint32_t warp_max(uint32_t w) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xFFFFFFFFu, w);
#else
    for (int d = 16; d; d >>= 1) w = max(w, __shfl_xor_sync(0xFFFFFFFFu, w, d));
    return w;
#endif
}
HD uint32_t lane_max(const float (&x)[8]) {
    float a = larger_magnitude(x[0], x[1]), b = larger_magnitude(x[2], x[3]);
    float c = larger_magnitude(x[4], x[5]), d = larger_magnitude(x[6], x[7]);
    return bits(larger_magnitude(larger_magnitude(a, b), larger_magnitude(c, d)));
}
HD uint32_t block_max(uint32_t w, uint32_t shift) {  // over 2^shift neighbouring lanes
    if (shift >= 5) return warp_max(w);
#pragma unroll
    for (uint32_t k = 0; k < 4; k++)
        if (k < shift) w = max(w, __shfl_xor_sync(0xFFFFFFFFu, w, 1u << k));
    return w;
}

struct Where {  // a lane's eight elements: their number in the tensor, their row, their number in the row
    uint32_t i, row, within;
    bool inside;  // lanes beyond a short tile repeat eight of its elements and store nothing
};

// What a block's magnitude makes of it: the stored scale, the factor that brings it to [-1, 1], whether it has codes.
struct Measure {
    float scale, inv;
    bool live, wide;  // wide: beyond the range of Core's square root
    template <class C> static HD Measure of(uint32_t magnitude) {
        float a = real(magnitude);
        if (magnitude - 0x0D800000u < 0x71000000u) {  // 2^-100 .. 2^126
            float s = C::scale(a);
            if (!C::FACTOR_OF_SCALE) return {s, Core::rcp_core(a), true, false};
            return {s, bits(s) ? divide(1.0f, s) : 0.0f, bits(s) != 0, a >= 4.6116860e18f};
        }
        if (!(a < real(0x7F800000u))) return {real(0x7FC00000u), 0.0f, false, false};
        if (a < 7.8886091e-31f) return {0.0f, 0.0f, false, false};  // 2^-100
        float s = C::scale(a);
        return {s, divide(1.0f, C::FACTOR_OF_SCALE ? s : a), true, true};
    }
};

// ---- one state ----

struct __align__(16) Slot {  // where one state of one tensor lies
    char* codes;
    char* scales;
    uint32_t shift, per;     // 2^shift lanes (of eight elements) share a scale; scales a row, 0 where the tensor is one row
    uint32_t block, bytes;   // elements that share a scale; bytes of codes a row where it is not the whole tensor
};

struct Span {  // some elements of one row
    int64_t row, within;
    uint32_t length;
};

// A codec, log2 of the lanes that share a scale where rows are no shorter, and where its tables lie in shared memory.
template <class C, uint32_t S, uint32_t V, uint32_t W> struct State {
    typedef C Codec;
    static constexpr uint32_t SHIFT = S, VALUES = V, WORDS = W;
};

// EASY below: whole tiles of a tensor of one row whose blocks are those that the kernel was compiled for.

template <class S, bool SCALED = S::Codec::SCALED> struct Stored;

template <class S> struct Stored<S, true> {  // codes of 8 or 4 bits, with scales
    typedef typename S::Codec C;
    static constexpr int CODES = 32 / C::BITS;  // in a word
    uint32_t words[8 / CODES];
    float scale;
    static HD float take_scale(const char* scales, uint32_t i) {
        if constexpr (C::SCALE_BITS == 16) return C::widen_scale(take2(scales + (uint64_t)i * 2));
        return take_float(scales + (uint64_t)i * 4);
    }
    static HD void give_scale(char* scales, uint32_t i, float v) {
        if constexpr (C::SCALE_BITS == 16) give2(scales + (uint64_t)i * 2, C::narrow_scale(v));
        else give4(scales + (uint64_t)i * 4, bits(v));
    }
    template <bool EASY> static HD uint32_t shift(const Slot& at) { return EASY ? S::SHIFT : at.shift; }
    template <bool EASY> static HD uint32_t per(const Slot& at) { return EASY ? 0 : at.per; }
    template <bool EASY> static HD bool kept(const Slot& at) { return per<EASY>(at) == 0 && shift<EASY>(at) >= 3; }
    template <bool EASY> static HD uint32_t scale_of(const Slot& at, const Where& w) {
        return (EASY ? 0 : w.row * at.per) + (w.within >> shift<EASY>(at));
    }
    template <bool EASY> HD void load(const Slot& at, const Where& w) { load(at, w.i, scale_of<EASY>(at, w)); }
    HD void load(const Slot& at, uint32_t i, uint32_t block) {
        if constexpr (C::BITS == 8) {
            uint2 v = take8(at.codes + (uint64_t)i * 8);
            words[0] = v.x, words[1] = v.y;
        } else {
            words[0] = take4(at.codes + (uint64_t)i * 4);
        }
        scale = take_scale(at.scales, block);
    }
    HD void get(float (&x)[8], const Shared& shared) const {
        auto t = shared.of<S>();
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = C::decode(words[i / CODES], i % CODES, scale, t);
    }
    // Lane i holds the magnitude of tile i of a group; a block covers 2^(shift - 5) of them.
    static HD void grow(const float (&x)[8], uint32_t i, uint32_t lane, uint32_t& magnitude) {
        uint32_t w = warp_max(lane_max(x));
        if (lane == i) magnitude = w;
    }
    template <bool EASY> static HD void measure(const Slot& at, const float (&x)[8], uint32_t i, uint32_t lane, uint32_t seen, Measure& m) {
        const uint32_t s = shift<EASY>(at);
        m = Measure::of<C>(block_max(s <= 5 ? lane_max(x) : (lane ^ i) >> (s - 5) ? 0 : seen, s));
    }
    template <class A, int WORDS> static HD void encode(const float* x, const Measure& m, const Shared& shared, uint32_t* word) {
        A a;
#pragma unroll
        for (int k = 0; k < WORDS; k++) word[k] = C::encode(a, x + k * CODES, m.inv, shared.of<S>());
    }
    static HD void code(const float (&x)[8], const Measure& m, const Shared& shared, uint32_t (&word)[8 / CODES]) {
#pragma unroll
        for (int k = 0; k < 8 / CODES; k++) word[k] = C::ZERO;
        if (C::FACTOR_OF_SCALE && m.live && m.wide) encode<Ieee, 8 / CODES>(x, m, shared, word);
        else if (m.live) encode<Core, 8 / CODES>(x, m, shared, word);
    }
    static HD void put(const Slot& at, uint32_t i, bool inside, const float (&x)[8], const Measure& m, const Shared& shared) {
        uint32_t word[8 / CODES];
        code(x, m, shared, word);
        if (!inside) return;
        if constexpr (C::BITS == 8) give8(at.codes + (uint64_t)i * 8, make_uint2(word[0], word[1]));
        else give4(at.codes + (uint64_t)i * 4, word[0]);
    }
    // Scales of tile j of a unit: kept until the unit ends where a whole sector comes together, else stored at once.
    template <bool EASY> static HD void keep(const Slot& at, const Where& w, uint32_t lane, uint32_t j, float scale, float& hold) {
        const uint32_t s = shift<EASY>(at);
        const bool later = kept<EASY>(at);
        if (s > 5 || (s == 5 && later)) {
            if (lane == (later ? j : j % GROUP) >> (s - 5)) hold = scale;
        } else if (!later) {
            if (w.inside && (w.within & ((1u << s) - 1)) == 0) give_scale(at.scales, scale_of<EASY>(at, w), scale);
        } else {
            float v = __shfl_sync(0xFFFFFFFFu, scale, (lane << s) & 31);
            if (lane >> (5 - s) == j) hold = v;
        }
    }
    // Scales of a row's blocks of several tiles: written when all of them have read the old ones.
    static HD void flush(const Slot& at, const Span& first, uint32_t lane, float hold) {
        uint32_t i = (uint32_t)(first.within / TILE) >> (at.shift - 5);
        if (at.per && at.shift > 5 && lane < GROUP * 32u >> at.shift && i + lane < at.per) give_scale(at.scales, (uint32_t)first.row * at.per + i + lane, hold);
    }
    template <bool EASY> static HD uint32_t mine(const Slot& at, uint32_t lane) {  // the tile of a unit whose scale a lane keeps, or one of its scales
        const uint32_t s = shift<EASY>(at);
        return s >= 5 ? lane << (s - 5) : lane >> (5 - s);
    }
    template <bool EASY> static HD void again(const Slot& at, uint32_t tile, uint32_t j, int64_t total, uint32_t lane, float& hold) {  // those from tile j on are in memory
        uint32_t i = (tile << 5 >> shift<EASY>(at)) + lane;
        if (kept<EASY>(at) && mine<EASY>(at, lane) - j < GROUP && (EASY || i < scales(at, total))) hold = take_scale(at.scales, i);
    }
    static HD int64_t scales(const Slot& at, int64_t eights) { return (eights + (1 << at.shift) - 1) >> at.shift; }  // of a tensor of one row
    template <bool EASY> static HD void close(const Slot& at, uint32_t tile, uint32_t count, int64_t total, uint32_t lane, float hold) {
        uint32_t i = (tile << 5 >> shift<EASY>(at)) + lane;
        if (kept<EASY>(at) && mine<EASY>(at, lane) < count && (EASY || i < scales(at, total))) give_scale(at.scales, i, hold);
    }
    // one or two elements at a time, two where they share a byte
    static HD char* byte_at(const Slot& at, int64_t row, int64_t within, int64_t columns) {
        if constexpr (C::BITS == 8) return at.codes + row * columns + within;
        int64_t block = within / at.block;
        return at.codes + row * at.bytes + block * ((at.block + 1) / 2) + (within - block * at.block) / 2;
    }
    static HD float one(const Slot& at, int64_t row, int64_t within, int64_t columns, const Shared& shared) {
        int64_t block = within / at.block;
        uint32_t code = *(const uint8_t*)byte_at(at, row, within, columns), half = C::BITS == 4 ? (within - block * at.block) & 1 : 0;
        return C::decode(code, half, take_scale(at.scales, row * at.per + block), shared.of<S>());
    }
    static HD void two(const Slot& at, int64_t row, int64_t within, int64_t columns, float a, float b, bool both, const Measure& m,
                       const Shared& shared) {
        const float x[CODES] = {a, both ? b : 0.0f};
        uint32_t word = C::ZERO;
        if (m.live) encode<Ieee, 1>(x, m, shared, &word);
        char* to = byte_at(at, row, within, columns);
        to[0] = (char)word;
        if (C::BITS == 8 && both) to[1] = (char)(word >> 8);
    }
};

template <class C> struct number_of { typedef float32 type; };
template <> struct number_of<bf16> { typedef bfloat16 type; };

template <class S> struct Stored<S, false> {  // a number each, no scale
    typedef typename number_of<typename S::Codec>::type N;
    typename N::Raw raw;
    template <bool EASY> HD void load(const Slot& at, const Where& w) { N::load(at.codes, w.i, raw); }
    HD void get(float (&x)[8], const Shared&) const { N::get(raw, x); }
    static HD void grow(const float (&)[8], uint32_t, uint32_t, uint32_t&) {}
    template <bool EASY> static HD void measure(const Slot&, const float (&)[8], uint32_t, uint32_t, uint32_t, Measure&) {}
    static HD void put(const Slot& at, uint32_t i, bool inside, const float (&x)[8], const Measure&, const Shared&) {
        if (inside) N::put(at.codes, i, x);
    }
    template <bool EASY> static HD void keep(const Slot&, const Where&, uint32_t, uint32_t, float, float&) {}
    static HD void flush(const Slot&, const Span&, uint32_t, float) {}
    template <bool EASY> static HD void again(const Slot&, uint32_t, uint32_t, int64_t, uint32_t, float&) {}
    template <bool EASY> static HD void close(const Slot&, uint32_t, uint32_t, int64_t, uint32_t, float) {}
    static HD float one(const Slot& at, int64_t row, int64_t within, int64_t columns, const Shared&) {
        return N::one((const char*)at.codes, row * columns + within);
    }
    static HD void two(const Slot& at, int64_t row, int64_t within, int64_t columns, float a, float b, bool both, const Measure&,
                       const Shared&) {
        N::one(at.codes, row * columns + within, a);
        if (both) N::one(at.codes, row * columns + within + 1, b);
    }
};

// ---- all states of a rule, one after the other ----

template <class... S> struct Load;
template <> struct Load<> {
    template <class A> static HD bool claim(const Slot*, uint32_t, A&) { return false; }
    template <bool EASY> HD void load(const Slot*, const Where&) {}
    HD void get(float (*)[8], const Shared&) const {}
    static HD void grow(const float (*)[8], uint32_t, uint32_t, uint32_t*) {}
    template <bool EASY> static HD void measure(const Slot*, const float (*)[8], uint32_t, uint32_t, const uint32_t*, Measure*) {}
    static HD void put(const Slot*, uint32_t, bool, const float (*)[8], const Measure*, const Shared&) {}
    template <bool EASY> static HD void keep(const Slot*, const Where&, uint32_t, uint32_t, const Measure*, float*) {}
    static HD void flush(const Slot*, const Span&, uint32_t, const float*) {}
    template <bool EASY> static HD void again(const Slot*, uint32_t, uint32_t, int64_t, uint32_t, float*) {}
    template <bool EASY> static HD void close(const Slot*, uint32_t, uint32_t, int64_t, uint32_t, const float*) {}
    static HD void one(const Slot*, int64_t, int64_t, int64_t, float*, const Shared&) {}
    static HD void two(const Slot*, int64_t, int64_t, int64_t, const float*, const float*, bool, const Measure*, const Shared&) {}
    static HD uint32_t least(const Slot*, uint32_t most) { return most; }
    static HD uint32_t reach(const Slot*, uint32_t) { return 0; }
    static HD void grow(const Slot*, uint32_t, uint32_t, const float*, uint32_t*) {}
    static HD void settle(const Slot*, uint32_t, uint32_t*, Measure*) {}
    static HD void give(const Slot*, int64_t, int64_t, uint32_t, uint32_t, bool, const Measure*) {}
};
template <class S, class... More> struct Load<S, More...> {
    typedef typename S::Codec C;
    typedef Load<More...> Next;
    Stored<S> head;
    Next rest;
    template <class A> static HD bool claim(const Slot* at, uint32_t lane, A& ahead) {  // tiles are prefetched in lines of 128 bytes
        return A::claim(at->codes, C::BITS / 4, lane, ahead) || Next::claim(at + 1, lane, ahead);
    }
    template <bool EASY> HD void load(const Slot* at, const Where& w) { head.template load<EASY>(*at, w), rest.template load<EASY>(at + 1, w); }
    HD void get(float (*x)[8], const Shared& t) const { head.get(*x, t), rest.get(x + 1, t); }
    static HD void grow(const float (*x)[8], uint32_t i, uint32_t lane, uint32_t* a) {
        Stored<S>::grow(*x, i, lane, *a), Next::grow(x + 1, i, lane, a + 1);
    }
    template <bool EASY> static HD void measure(const Slot* at, const float (*x)[8], uint32_t i, uint32_t lane, const uint32_t* a, Measure* m) {
        Stored<S>::template measure<EASY>(*at, *x, i, lane, *a, *m), Next::template measure<EASY>(at + 1, x + 1, i, lane, a + 1, m + 1);
    }
    static HD void put(const Slot* at, uint32_t i, bool inside, const float (*x)[8], const Measure* m, const Shared& t) {
        Stored<S>::put(*at, i, inside, *x, *m, t), Next::put(at + 1, i, inside, x + 1, m + 1, t);
    }
    template <bool EASY> static HD void keep(const Slot* at, const Where& w, uint32_t lane, uint32_t j, const Measure* m, float* hold) {
        Stored<S>::template keep<EASY>(*at, w, lane, j, m->scale, *hold), Next::template keep<EASY>(at + 1, w, lane, j, m + 1, hold + 1);
    }
    static HD void flush(const Slot* at, const Span& first, uint32_t lane, const float* hold) {
        Stored<S>::flush(*at, first, lane, *hold), Next::flush(at + 1, first, lane, hold + 1);
    }
    template <bool EASY> static HD void again(const Slot* at, uint32_t tile, uint32_t j, int64_t total, uint32_t lane, float* hold) {
        Stored<S>::template again<EASY>(*at, tile, j, total, lane, *hold), Next::template again<EASY>(at + 1, tile, j, total, lane, hold + 1);
    }
    template <bool EASY> static HD void close(const Slot* at, uint32_t tile, uint32_t count, int64_t total, uint32_t lane, const float* hold) {
        Stored<S>::template close<EASY>(*at, tile, count, total, lane, *hold), Next::template close<EASY>(at + 1, tile, count, total, lane, hold + 1);
    }
    // one element, or two, at a time
    static HD void one(const Slot* at, int64_t row, int64_t within, int64_t columns, float* x, const Shared& t) {
        *x = Stored<S>::one(*at, row, within, columns, t), Next::one(at + 1, row, within, columns, x + 1, t);
    }
    static HD void two(const Slot* at, int64_t row, int64_t within, int64_t columns, const float* a, const float* b, bool both,
                       const Measure* m, const Shared& t) {
        Stored<S>::two(*at, row, within, columns, *a, *b, both, *m, t), Next::two(at + 1, row, within, columns, a + 1, b + 1, both, m + 1, t);
    }
    static HD uint32_t least(const Slot* at, uint32_t most) { return Next::least(at + 1, C::SCALED ? min(most, at->block) : most); }
    static HD uint32_t reach(const Slot* at, uint32_t o) {  // elements of the longest block that begins at o
        return max(C::SCALED && o % at->block == 0 ? at->block : 0, Next::reach(at + 1, o));
    }
    static HD void grow(const Slot* at, uint32_t o, uint32_t i, const float* x, uint32_t* a) {  // element i of the blocks that begin at o
        if (C::SCALED && o % at->block == 0 && i - o < at->block) *a = max(*a, bits(*x) & 0x7FFFFFFFu);
        Next::grow(at + 1, o, i, x + 1, a + 1);
    }
    static HD void settle(const Slot* at, uint32_t o, uint32_t* a, Measure* m) {
        if constexpr (C::SCALED) {
            if (o % at->block == 0) *m = Measure::of<C>(warp_max(*a));
        }
        Next::settle(at + 1, o, a + 1, m + 1);
    }
    static HD void give(const Slot* at, int64_t row, int64_t within, uint32_t o, uint32_t step, bool last, const Measure* m) {  // blocks that end
        if constexpr (C::SCALED) {
            if (last || (o + step) % at->block == 0) Stored<S>::give_scale(at->scales, row * at->per + (within + o) / at->block, m->scale);
        }
        Next::give(at + 1, row, within, o, step, last, m + 1);
    }
};
