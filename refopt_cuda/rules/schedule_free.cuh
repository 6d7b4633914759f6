// Schedule-Free AdamW: see refopt/rules/schedule_free.py. p is y, where gradients are taken. States: z, v.
struct schedule_free {
    static constexpr int STATES = 2;
    struct Scalars { float gs, lr, c, along, beta2, omb2, ir2, eps, wd; };
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[2], const Scalars& s) {
        float &z = x[0], &v = x[1];
        v = add(mul(s.beta2, v), mul(s.omb2, mul(g, g)));
        float u = add(mul(g, over_root<OUTSIDE>(a, v, s.ir2, s.eps)), mul(s.wd, p));
        p = add(p, mul(s.c, sub(z, p)));
        p = add(p, mul(s.along, u));
        z = sub(z, mul(s.lr, u));
    }
};
