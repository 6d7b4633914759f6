// Adafactor: see refopt/rules/adafactor.py. Factors R and C; V for a vector; m under MOMENTUM.
template <bool MOMENTUM, bool SCALED> struct adafactor {
    static constexpr int KEPT = MOMENTUM ? 2 : 1, SUMS = SCALED ? 2 : 1, PAIRS = 1, BATCH = 2, UPDATE_BATCH = MOMENTUM ? 1 : 2;
    static constexpr int UPDATE_READS = MOMENTUM ? 15 : 7, UPDATE_USES = 1;
    struct Scalars { float gs, b2, omb2, plus, top, beta1, omb1, low; };
    struct Wide { double rho, eps2, clip, wd, shrink; };  // shrink < 0: alpha, whatever it comes to
    struct Hypers { double lr, eps1, eps2, clip, decay_rate, beta1, wd, relative_step, warmup_init, variant; };
    HD static void scalars(uint64_t t, bool, double gs, const Hypers& h, Scalars& s, Wide& w) {
        const bool torch = h.variant == 1.0, fixed = given(h.lr);
        const double n = (double)t, b2 = sub64(1.0, power64(n, h.decay_rate)), beta1 = given(h.beta1) ? h.beta1 : 0.0;
        w.rho = h.lr, w.eps2 = h.eps2, w.clip = h.clip, w.wd = h.wd;
        if (h.relative_step != 0.0 || !fixed) {
            const double cap = fixed ? h.lr : h.warmup_init != 0.0 ? mul64(1e-6, n) : 1e-2, slow = div64(1.0, sqrt64(n));
            w.rho = slow < cap ? slow : cap;
        }
        const double low = !torch ? 0.0 : given(h.eps1) ? h.eps1 : 1.1920928955078125e-07;  // 2^-23
        const double plus = torch ? 0.0 : given(h.eps1) ? h.eps1 : 1e-30;
        w.shrink = !torch ? -1.0 : fixed ? h.lr : 1e-2;
        s.gs = rounded(gs), s.b2 = rounded(b2), s.omb2 = rounded(sub64(1.0, b2)), s.plus = rounded(plus), s.low = rounded(low);
        s.top = rounded(torch && low != 0.0 ? div64(1.0, low) : infinity64());
        s.beta1 = rounded(beta1), s.omb1 = rounded(sub64(1.0, beta1));
    }
    static constexpr int sums_read(int) { return SCALED ? 7 : 6; }
    static constexpr int sums_use(int) { return 1; }
    static constexpr int tiles_read(int) { return 2; }
    static constexpr int tiles_use(int) { return 0; }
    HD static float keep(int, const Scalars& s) { return s.b2; }
    HD static float gain(int, const Scalars& s) { return s.omb2; }
    HD static double least(const Scalars& s) { return widened(s.low); }
    template <int PASS, class A, class E> HD static float tile(A&, const E& e, const Scalars& s) { return add(mul(e.g, e.g), s.plus); }
    template <class A, class E> HD static float direction(A& a, E& e, const Scalars& s) {  // U before it is cut
        float inverse = e.inverse[0];
        if (e.vector) {
            e.x[0] = add(mul(s.b2, e.x[0]), mul(s.omb2, add(mul(e.g, e.g), s.plus)));
            inverse = a.rcp(a.sqrt(e.x[0]));
        }
        return mul(minimum(inverse, s.top), e.g);
    }
    template <int PASS, class A, class E> HD static void sums(A& a, E e, const Scalars& s, float (&out)[SUMS]) {
        out[0] = direction(a, e, s);
        if (SCALED) out[SUMS - 1] = e.p;
    }
    HD static double rms(double sum, double n) { return widened(rounded(sqrt64(div64(sum, n)))); }
    template <int PASS> HD static void finish(const double (&r)[SUMS], double n, const Scalars&, const Wide& w, float*, float* k) {
        double size = SCALED ? maximum64(w.eps2, rms(r[SUMS - 1], n)) : 1.0;
        float alpha = rounded(mul64(size, w.rho));
        k[0] = divide(1.0f, maximum(1.0f, rounded(div64(rms(r[0], n), w.clip))));
        k[1] = alpha;
        k[2] = rounded(sub64(1.0, mul64(w.wd, w.shrink < 0.0 ? widened(alpha) : w.shrink)));
    }
    template <class A, class E> HD static void update(A& a, E& e, const Scalars& s) {
        float u = mul(e.k[1], mul(direction(a, e, s), e.k[0]));
        if (MOMENTUM) {
            float& m = e.x[KEPT - 1];
            u = m = add(mul(s.beta1, m), mul(s.omb1, u));
        }
        e.p = sub(mul(e.p, e.k[2]), u);
    }
};
