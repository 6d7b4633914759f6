// LARS: see refopt/rules/lars.py. State: v.
template <int VARIANT> struct lars {
    static constexpr int KEPT = 1, SUMS = 2, PAIRS = 0, BATCH = 2, UPDATE_BATCH = 1;
    static constexpr int UPDATE_READS = 7, UPDATE_USES = 0;
    struct Scalars { float gs, momentum, wd; };
    struct Wide { double lr, trust, wd, eps, longest, bare; };
    struct Hypers { double lr, trust, momentum, wd, eps, longest, exclude_1d; };
    HD static void scalars(uint64_t, bool vector, double gs, const Hypers& h, Scalars& s, Wide& w) {
        const bool bare = h.exclude_1d != 0.0 && vector;
        const double wd = bare ? 0.0 : h.wd;
        s.gs = rounded(gs), s.momentum = rounded(h.momentum), s.wd = rounded(wd);
        w.lr = h.lr, w.trust = h.trust, w.wd = wd, w.eps = h.eps, w.longest = h.longest, w.bare = bare ? 1.0 : 0.0;
    }
    static constexpr int sums_read(int) { return VARIANT == CLIP ? 7 : 3; }
    static constexpr int sums_use(int) { return 0; }
    template <class E> HD static float decayed(const E& e, const Scalars& s) { return add(e.g, mul(s.wd, e.p)); }
    template <int PASS, class A, class E> HD static void sums(A&, const E& e, const Scalars& s, float (&out)[SUMS]) {
        out[0] = e.p;
        out[1] = VARIANT == CLIP ? add(mul(s.momentum, e.x[0]), e.g) : VARIANT == OPTAX ? decayed(e, s) : e.g;
    }
    template <int PASS> HD static void finish(const double (&r)[SUMS], double, const Scalars&, const Wide& w, float*, float* k) {
        double wn = sqrt64(r[0]), un = sqrt64(r[1]), q = 1.0;
        if (VARIANT == CLIP) {
            double most = mul64(w.longest, wn);
            if (un > most && most > 0.0 && w.bare == 0.0) q = div64(most, un);
        } else if (wn > 0.0 && un > 0.0 && w.bare == 0.0) {
            double size = VARIANT == OPTAX ? un : add64(un, mul64(w.wd, wn));
            q = div64(mul64(w.trust, wn), add64(size, w.eps));
        }
        k[0] = rounded(mul64(w.lr, q));
    }
    template <class A, class E> HD static void update(A&, E& e, const Scalars& s) {
        float d = decayed(e, s), &v = e.x[0];
        v = add(mul(s.momentum, v), VARIANT == CLIP ? d : mul(e.k[0], d));
        e.p = sub(e.p, VARIANT == CLIP ? mul(e.k[0], v) : v);
    }
};
