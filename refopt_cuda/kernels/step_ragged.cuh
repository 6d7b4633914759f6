// Rows that are not whole blocks: tiles of 32 neighbouring eights of elements, wherever rows and blocks end, so that
// loads and stores are whole lines. A block may begin in one tile and end in the next: codes are written a tile late,
// when the largest magnitude of its other part is known. A piece of work is the blocks that begin in its tiles; the last
// of them may end in the tile behind, of which the next piece takes the rest.

struct Spot {  // a lane's eight elements: their number in the tensor, their row, their number in the row
    uint32_t i, row, within;
    HD void next(uint32_t eights) {  // 32 eights on, in rows of so many
        i += 32, within += 32;
        if (within < eights) return;
        const uint32_t more = eights > 32 ? 1 : within / eights;
        row += more, within -= more * eights;
    }
    HD Spot of(uint32_t lane) const {  // that of another lane
        return {__shfl_sync(0xFFFFFFFFu, i, lane), __shfl_sync(0xFFFFFFFFu, row, lane), __shfl_sync(0xFFFFFFFFu, within, lane)};
    }
};

// Which scales of blocks of 8 << SHIFT elements wait to be written, eight at a time: lane k keeps the next whose number is
// k modulo 32.
template <uint32_t SHIFT> struct Queue {
    static constexpr uint32_t MASK = (1u << SHIFT) - 1;
    uint32_t first;  // that waits
    uint32_t start;  // the eight where the block of this lane's scale begins
    HD static uint32_t per(uint32_t eights) { return (eights + MASK) >> SHIFT; }  // scales a row
    HD static uint32_t block(const Spot& at, uint32_t eights) { return at.row * per(eights) + (at.within >> SHIFT); }
    HD static uint32_t begun(const Spot& at, uint32_t eights) {  // blocks that begin in front of a tile
        return __shfl_sync(0xFFFFFFFFu, block(at, eights) + ((at.within & MASK) != 0), 0);
    }
    HD uint32_t turn(uint32_t lane) const { return first + ((lane - first) & 31); }
    HD void wait(uint32_t from, uint32_t lane, uint32_t eights) {
        first = from;
        const uint32_t i = turn(lane), row = i / per(eights);
        start = row * eights + ((i - row * per(eights)) << SHIFT);
    }
    // Tiles until more than 24 may have begun, as a mask: fewer than 8 wait already.
    HD static uint32_t pace(uint32_t eights) { return eights <= 32 || SHIFT < 3 ? 0 : (1u << (SHIFT - 2)) - 1; }
};
template <> struct Queue<0> {};

// The largest of each block's words, in all of its lanes: a tile's lanes, or those of them that a block of 2^SHIFT has.
template <uint32_t SHIFT> HD uint32_t block_most(uint32_t w, uint32_t offset, uint32_t last, uint32_t lane, uint32_t eights) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    if (SHIFT == 5 && eights > 32) {  // at most two blocks begin in a tile
        const uint32_t begun = __ballot_sync(0xFFFFFFFFu, offset == 0);
        const uint32_t second = begun ? __ffs(begun) - 1 : 32, third = begun ? 31 - __clz(begun) : 32;
        const uint32_t a = warp_max(lane < second ? w : 0), b = warp_max(lane < second || lane >= third ? 0 : w), c = warp_max(lane < third ? 0 : w);
        return lane < second ? a : lane < third ? b : c;
    }
#endif
#pragma unroll
    for (uint32_t d = 1; d < 1u << SHIFT; d <<= 1) {
        const uint32_t before = __shfl_up_sync(0xFFFFFFFFu, w, d);
        if (offset >= d) w = max(w, before);  // lanes below d get their own
    }
    return __shfl_sync(0xFFFFFFFFu, w, min(last, 31u));
}

// What a lane keeps of one state until the next tile: its values, the largest magnitude of their block, and a scale.
template <class S, bool SCALED = S::Codec::SCALED> struct Late;

template <class S> struct Late<S, true> {
    typedef typename S::Codec C;
    typedef Stored<S> Codes;
    static constexpr uint32_t SHIFT = S::SHIFT, MASK = (1u << SHIFT) - 1, OPEN = 1u << 31;
    float x[8], kept;
    uint32_t most;  // OPEN: the block goes on in the next tile
    HD static void load(const Slot& at, const Spot& from, uint32_t eights, Codes& codes) { codes.load(at, from.i, Queue<SHIFT>::block(from, eights)); }
    HD static void put_now(const Slot&, uint32_t, bool, const float (&)[8]) {}
    // The magnitudes of a new tile, and what they add to those of the tile before.
    HD uint32_t arrive(const float (&fresh)[8], const Spot& at, uint32_t lane, uint32_t eights) {
        const uint32_t offset = at.within & MASK, last = lane + min(MASK - offset, eights - 1 - at.within);
        uint32_t w = block_most<SHIFT>(lane_max(fresh), offset, last, lane, eights);
        const uint32_t head = __shfl_sync(0xFFFFFFFFu, w, 0), tail = __shfl_sync(0xFFFFFFFFu, most, 31);
        if (most & OPEN) most = max(most, head | OPEN);
        if (offset > lane) w = max(w, tail & ~OPEN);
        return last > 31 ? w | OPEN : w;
    }
    // The codes of the tile before, whose first eight is `base`, and of the scales of its blocks the one that waits here.
    HD void put(const Slot& slot, const Queue<SHIFT>& queue, uint32_t base, uint32_t lane, bool mine, const Shared& shared) {
        const Measure m = Measure::of<C>(most & ~OPEN);
        Codes::put(slot, base + lane, mine, x, m, shared);
        const uint32_t from = queue.start - base;
        const float v = __shfl_sync(0xFFFFFFFFu, m.scale, from & 31);
        if (from < 32) kept = v;
    }
    HD void clear() { most = 0, kept = 0.0f; }
    HD void write(const Slot& slot, const Queue<SHIFT>& queue, uint32_t lane, uint32_t until) const {  // scales in front of that one
        if (queue.turn(lane) < until) Codes::give_scale(slot.scales, queue.turn(lane), kept);
    }
    HD void take(const float (&fresh)[8], uint32_t magnitude) {
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = fresh[e];
        most = magnitude;
    }
};

template <class S> struct Late<S, false> {  // a number each: written at once
    typedef Stored<S> Codes;
    static constexpr uint32_t SHIFT = 0;
    HD void clear() {}
    HD static void load(const Slot& at, const Spot& from, uint32_t, Codes& codes) { codes.template load<true>(at, {from.i, 0, from.i, true}); }
    HD static void put_now(const Slot& slot, uint32_t i, bool mine, const float (&x)[8]) { Codes::put(slot, i, mine, x, Measure(), Shared()); }
    HD uint32_t arrive(const float (&)[8], const Spot&, uint32_t, uint32_t) { return 0; }
    template <class Q> HD void put(const Slot&, const Q&, uint32_t, uint32_t, bool, const Shared&) {}
    template <class Q> HD void write(const Slot&, const Q&, uint32_t, uint32_t) const {}
    HD void take(const float (&)[8], uint32_t) {}
};

// All states of a rule, one after the other; neighbours whose blocks are of one size, SHIFT, share a queue.
template <uint32_t SHIFT, class... S> struct Lates {
    static constexpr uint32_t LARGEST = 0;
    template <class Q> HD void begin(Q&, const Spot&, uint32_t, uint32_t, uint32_t) {}
    HD static void load(const Slot*, const Spot&, uint32_t, Load<>&) {}
    HD static void put_now(const Slot*, uint32_t, bool, const float (*)[8]) {}
    HD void arrive(const float (*)[8], const Spot&, uint32_t, uint32_t, uint32_t*) {}
    template <class Q> HD void put(const Slot*, Q&, uint32_t, uint32_t, bool, const Shared&) {}
    template <class Q> HD void write(const Slot*, Q&, uint32_t, uint32_t) {}
    HD void write(const Slot*, const Spot&, uint32_t, uint32_t, uint32_t) {}
    HD void end(const Slot*, const Spot&, uint32_t, uint32_t, uint32_t, uint32_t) {}
    HD void take(const float (*)[8], const uint32_t*) {}
};
template <uint32_t SHIFT, class S, class... More> struct Lates<SHIFT, S, More...> {
    static constexpr bool OWN = Late<S>::SHIFT != 0 && Late<S>::SHIFT != SHIFT;
    typedef Lates<OWN ? Late<S>::SHIFT : SHIFT, More...> Next;
    static constexpr uint32_t LARGEST = Late<S>::SHIFT > Next::LARGEST ? Late<S>::SHIFT : Next::LARGEST;
    Late<S> head;
    Queue<OWN ? Late<S>::SHIFT : 0> own;
    Next rest;
    template <class Q> HD auto& queue(Q& theirs) {
        if constexpr (OWN) return own;
        else return theirs;
    }
    template <class Q> HD void begin(Q& theirs, const Spot& at, uint32_t lead, uint32_t lane, uint32_t eights) {
        if constexpr (OWN) own.wait(__shfl_sync(0xFFFFFFFFu, own.block(at, eights), lead), lane, eights);
        head.clear(), rest.begin(queue(theirs), at, lead, lane, eights);
    }
    HD static void load(const Slot* slot, const Spot& from, uint32_t eights, Load<S, More...>& states) {
        Late<S>::load(*slot, from, eights, states.head), Next::load(slot + 1, from, eights, states.rest);
    }
    HD static void put_now(const Slot* slot, uint32_t i, bool mine, const float (*x)[8]) {
        Late<S>::put_now(*slot, i, mine, *x), Next::put_now(slot + 1, i, mine, x + 1);
    }
    HD void arrive(const float (*x)[8], const Spot& at, uint32_t lane, uint32_t eights, uint32_t* most) {
        *most = head.arrive(*x, at, lane, eights), rest.arrive(x + 1, at, lane, eights, most + 1);
    }
    template <class Q> HD void put(const Slot* slot, Q& theirs, uint32_t base, uint32_t lane, bool mine, const Shared& shared) {
        head.put(*slot, queue(theirs), base, lane, mine, shared);
        rest.put(slot + 1, queue(theirs), base, lane, mine, shared);
    }
    template <class Q> HD void write(const Slot* slot, Q& theirs, uint32_t lane, uint32_t until) {  // those that share a queue
        if constexpr (!OWN) {
            head.write(*slot, theirs, lane, until), rest.write(slot + 1, theirs, lane, until);
        }
    }
    // Scales of blocks that begin in front of tile j of a piece, in eights, where it is time.
    HD void write(const Slot* slot, const Spot& at, uint32_t j, uint32_t lane, uint32_t eights) {
        if constexpr (OWN) {
            if ((j & own.pace(eights)) == 0) {
                const uint32_t until = own.begun(at, eights) & ~7u;
                if (until > own.first) {
                    head.write(*slot, own, lane, until), rest.write(slot + 1, own, lane, until);
                    own.wait(until, lane, eights);
                }
            }
        }
        rest.write(slot + 1, at, j, lane, eights);
    }
    // The others, of blocks in front of that which begins in lane `lead`.
    HD void end(const Slot* slot, const Spot& at, uint32_t lead, uint32_t lane, uint32_t eights, uint32_t rows) {
        if constexpr (OWN) {
            const uint32_t until = min(__shfl_sync(0xFFFFFFFFu, own.block(at, eights), lead), rows * own.per(eights));
            head.write(*slot, own, lane, until), rest.write(slot + 1, own, lane, until);
        }
        rest.end(slot + 1, at, lead, lane, eights, rows);
    }
    HD void take(const float (*x)[8], const uint32_t* most) { head.take(*x, *most), rest.take(x + 1, most + 1); }
};
typedef Lates<0, CODECS> Held;

// The step of a lane's eight elements by the IEEE instructions: the states, and behind them the weights.
__device__ __noinline__ void carefully(const Args& a, uint32_t k, const Spot from, const char* shared, float (*x)[8]) {
    const Tensor& t = a.tensors[k];
    const Task task(a, k, t, {shared, (threadIdx.x & 31) * 4});
    Ieee ieee;
    for (uint32_t e = 0; e < 8; e++) {
        const int64_t i = (int64_t)from.i * 8 + e;
        float y[KEPT] = {}, p = WEIGHT::one(t.at, i), g = mul(GRAD::one(task.g, i), task.s.gs);
        if (READS) States::one(t.states, from.row, (int64_t)from.within * 8 + e, t.row, y, task.shared);
        RULE::update(ieee, p, g, y, task.s);
        for (int n = 0; n < STATES; n++) x[n][e] = y[n];
        x[STATES][e] = p;
    }
}

// One tile: weights, and states that are numbers, are stored; fresh states of the others are left in x.
HD void step_spot(const Task& task, const Tensor& t, uint32_t i, bool mine, const Spot& from, uint32_t eights, float (&x)[KEPT][8]) {
    WEIGHT::Raw p;
    GRAD::Raw g;
    States states;
    float w[8];
    GRAD::load(task.g, from.i, g), WEIGHT::load(t.at, from.i, p);
    if (READS) Held::load(t.states, from, eights, states);
    if (__any_sync(0xFFFFFFFFu, advance(task, p, g, states, w, x))) {
        float y[STATES + 1][8];
        carefully(task.a, task.k, from, task.shared.at, y);
#pragma unroll
        for (int e = 0; e < 8; e++) {
#pragma unroll
            for (int n = 0; n < STATES; n++) x[n][e] = y[n][e];
            w[e] = y[STATES][e];
        }
    }
    uint32_t random[8];
    if (WEIGHT::RANDOM) r16x8(task.key, (uint64_t)i * 8, random);
    if (mine) WEIGHT::put(t.at, i, w, p, random);
    if (WRITES) Held::put_now(t.states, i, mine, x);
}

// The first lane where a longest block begins: such blocks make the pieces. Behind the last row there are more in thought.
HD uint32_t lead(const Spot& at, uint32_t lane, uint32_t mask) { return __ffs(__ballot_sync(0xFFFFFFFFu, (at.within & mask) <= lane)) - 1; }

HD void step_ragged(const Args& a, uint32_t k, uint32_t tile, uint32_t count, uint32_t warps, const Shared& shared) {
    const Tensor& t = a.tensors[k];
    const Task task(a, k, t, shared);
    const uint32_t jump = warps * (UNIT / GROUP) * t.piece - count;  // tiles to the next piece
    constexpr uint32_t MASK = (1u << Held::LARGEST) - 1;
    const uint32_t lane = task.lane, eights = (uint32_t)(t.row >> 3), total = (uint32_t)(t.n >> 3), rows = total / eights;
    const Ahead ahead(task, t);
    const uint32_t end = total < 32 ? 0 : total - 31;
    Spot at = {tile * 32 + lane, (tile * 32 + lane) / eights, (tile * 32 + lane) % eights};
    Held held;
    Queue<0> none;
    held.begin(none, at, lead(at, lane, MASK), lane, eights);
    bool before = false;  // whether the lane's elements of the tile before are of this piece
    uint32_t j = 0;
#pragma unroll 1
    for (;; j++) {
        Spot from = at;
        bool mine = true;
        if (j == 0 || j == count || at.i - lane + 32 > total) {  // other lanes repeat what one of these does, and store nothing
            mine = at.i < total && ((at.within & MASK) <= lane ? j < count : j > 0);
            const uint32_t who = __ballot_sync(0xFFFFFFFFu, mine);
            const Spot other = at.of(who ? __ffs(who) - 1 : 0);
            if (!mine) from = other;
        }
        if (AHEAD) ahead.ask(at.i - lane + (j < count ? 32 : jump * 32), end);
        float x[KEPT][8] = {};
        step_spot(task, t, at.i, mine, from, eights, x);
        if (WRITES) {
            uint32_t most[KEPT] = {};
            held.arrive(x, at, lane, eights, most);
            held.put(t.states, none, at.i - lane - 32, lane, before, task.shared);
            held.write(t.states, at, j, lane, eights);
            held.take(x, most), before = mine;
        }
        if (j == count) break;
        at.next(eights);
        if (j + 1 == count && !__any_sync(0xFFFFFFFFu, at.i < total && (at.within & MASK) > lane)) break;
    }
    if (WRITES) {  // now `at` lies in tile `count`
        held.put(t.states, none, at.i - lane - (j == count ? 0 : 32), lane, before, task.shared);
        held.end(t.states, at, lead(at, lane, MASK), lane, eights, rows);
    }
}

// The same blocks where addresses or rows are not multiples of eight elements.
__device__ __noinline__ void step_unaligned(const Args& a, uint32_t k, uint32_t tile, uint32_t count, const char* shared) {
    const Tensor& t = a.tensors[k];
    const Task task(a, k, t, {shared, (threadIdx.x & 31) * 4});
    constexpr int64_t BLOCK = 8 << Held::LARGEST;
    const int64_t from = (int64_t)tile * TILE, end = min(from + (int64_t)count * TILE, t.n);
    int64_t row = from / t.row, within = (from - row * t.row + BLOCK - 1) / BLOCK * BLOCK;
    for (;; within += BLOCK) {
        if (within >= t.row) within = 0, row++;
        if (row * t.row + within >= end) return;
        const Span at = {row, within, (uint32_t)min(BLOCK, t.row - within)};
        const bool one = Lone<CODECS>::ABLE && States::least(t.states, at.length) == at.length;  // of every state
        if (!one || !by_lane(task, t, at)) by_element(a, k, at, shared);
    }
}
