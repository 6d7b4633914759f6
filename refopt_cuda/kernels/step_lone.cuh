// Blocks that are not aligned, or lie in rows that are not in eights of elements, where a warp can keep one whole.

// One state of a block that a warp keeps while it steps it: lane k has elements k, k + 32 ... of it.
template <class S, bool SCALED = S::Codec::SCALED> struct Single;
template <class S> struct Single<S, true> {
    typedef typename S::Codec C;
    static constexpr bool ABLE = C::BITS == 8;  // where codes share a byte, so would lanes
    float scale;
    HD static uint32_t block(const Slot& at, const Span& in) { return (uint32_t)(in.row * at.per + in.within / at.block); }
    HD void begin(const Slot& at, const Span& in) { scale = Stored<S>::take_scale(at.scales, block(at, in)); }
    HD float take(const Slot& at, int64_t e, const Shared& shared) const {
        return C::decode(*(const uint8_t*)(at.codes + e), 0, scale, shared.of<S>());
    }
    HD static void put(const Slot& at, const Span& in, const float (&x)[8], int64_t first, uint32_t lane, const Shared& shared) {
        const Measure m = Measure::of<C>(warp_max(lane_max(x)));
        uint32_t word[8 / Stored<S>::CODES];
        Stored<S>::code(x, m, shared, word);
#pragma unroll
        for (uint32_t j = 0; j < 8; j++)
            if (lane + 32 * j < in.length) at.codes[first + 32 * j] = (char)(word[j / 4] >> 8 * (j & 3));
        if (lane == 0) Stored<S>::give_scale(at.scales, block(at, in), m.scale);
    }
};
template <class S> struct Single<S, false> {
    typedef typename Stored<S>::N N;
    static constexpr bool ABLE = true;
    HD void begin(const Slot&, const Span&) {}
    HD float take(const Slot& at, int64_t e, const Shared&) const { return N::one((const char*)at.codes, e); }
    HD static void put(const Slot& at, const Span& in, const float (&x)[8], int64_t first, uint32_t lane, const Shared&) {
#pragma unroll
        for (uint32_t j = 0; j < 8; j++)
            if (lane + 32 * j < in.length) N::one(at.codes, first + 32 * j, x[j]);
    }
};
template <class... S> struct Lone {
    static constexpr bool ABLE = true;
    HD void begin(const Slot*, const Span&) {}
    HD void take(const Slot*, int64_t, float*, const Shared&) const {}
    HD static void put(const Slot*, const Span&, const float (*)[8], int64_t, uint32_t, const Shared&) {}
};
template <class S, class... More> struct Lone<S, More...> {
    static constexpr bool ABLE = Single<S>::ABLE && Lone<More...>::ABLE;
    Single<S> head;
    Lone<More...> rest;
    HD void begin(const Slot* at, const Span& in) { head.begin(*at, in), rest.begin(at + 1, in); }
    HD void take(const Slot* at, int64_t e, float* x, const Shared& shared) const { *x = head.take(*at, e, shared), rest.take(at + 1, e, x + 1, shared); }
    HD static void put(const Slot* at, const Span& in, const float (*x)[8], int64_t first, uint32_t lane, const Shared& shared) {
        Single<S>::put(*at, in, *x, first, lane, shared), Lone<More...>::put(at + 1, in, x + 1, first, lane, shared);
    }
};

// One block of every state, of at most 256 elements. False, and nothing is stored, where Core may be wrong.
HD bool by_lane(const Task& task, const Tensor& t, const Span& in) {
    const int64_t first = in.row * t.row + in.within + task.lane;
    float p[8], x[KEPT][8] = {};
    Lone<CODECS> states;
    if (READS) states.begin(t.states, in);
    Core core;
#pragma unroll
    for (uint32_t j = 0; j < 8; j++) {
        const int64_t e = task.lane + 32 * j < in.length ? first + 32 * j : first - task.lane;  // others repeat the first
        float y[KEPT] = {}, g = mul(GRAD::one(task.g, e), task.s.gs);
        p[j] = WEIGHT::one(t.at, e);
        if (READS) states.take(t.states, e, y, task.shared);
        RULE::update(core, p[j], g, y, task.s);
        for (int n = 0; n < STATES; n++) x[n][j] = y[n];
    }
    if (__any_sync(0xFFFFFFFFu, core.doubtful())) return false;
#pragma unroll
    for (uint32_t j = 0; j < 8; j++) {
        const int64_t e = first + 32 * j;
        if (task.lane + 32 * j < in.length) WEIGHT::one(t.at, e, p[j], WEIGHT::RANDOM ? r16(task.key, e + (t.start & 3)) : 0);
    }
    if (WRITES) Lone<CODECS>::put(t.states, in, x, first, task.lane, task.shared);
    return true;
}
