// Signum: see refopt/rules/signum.py. State: m, none for beta = 0.
template <bool BETA, int DECAY_ORDER> struct signum {
    static constexpr int STATES = BETA;
    struct Scalars { float gs, lr, decay, beta, omb, wd; };
    struct Hypers { double lr, beta, wd; };
    HD static void scalars(uint64_t, double gs, const Hypers& h, Scalars& s) {
        s.gs = rounded(gs), s.lr = rounded(h.lr), s.decay = rounded(sub64(1.0, mul64(h.lr, h.wd)));
        s.beta = rounded(h.beta), s.omb = rounded(sub64(1.0, h.beta)), s.wd = rounded(h.wd);
    }
    template <class A> HD static void update(A&, float& p, float g, float (&x)[1], const Scalars& s) {
        if (DECAY_ORDER == BEFORE) p = mul(p, s.decay);
        if (BETA) x[0] = add(mul(s.beta, x[0]), mul(s.omb, g));
        float u = sgn(BETA ? x[0] : g);
        if (DECAY_ORDER == ADDITIVE) u = add(u, mul(s.wd, p));
        p = sub(p, mul(s.lr, u));
        if (DECAY_ORDER == AFTER) p = mul(p, s.decay);
    }
};
