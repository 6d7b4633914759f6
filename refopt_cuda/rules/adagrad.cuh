// Adagrad: see refopt/rules/adagrad.py. State: the sum of squares.
template <int EPS_AT> struct adagrad {
    static constexpr int STATES = 1;
    struct Scalars { float gs, clr, wd, eps, coupled; };
    struct Hypers { double lr, lr_decay, init_acc, eps, wd; };
    HD static void scalars(uint64_t t, double gs, const Hypers& h, Scalars& s) {
        s.gs = rounded(gs), s.clr = rounded(div64(h.lr, add64(1.0, mul64((double)(t - 1), h.lr_decay))));
        s.wd = rounded(h.wd), s.eps = rounded(h.eps), s.coupled = nonzero(s.wd);
    }
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[1], const Scalars& s) {
        float& total = x[0];
        if (s.coupled != 0.0f) g = add(g, mul(s.wd, p));
        total = add(total, mul(g, g));
        p = sub(p, mul(s.clr, mul(g, over_root<EPS_AT>(a, total, 1.0f, s.eps))));
    }
};
