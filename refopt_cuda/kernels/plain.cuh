// What a step of several library calls reads: what gradients are multiplied by, and the rate.
#pragma once

struct plain {
    struct Scalars { float gs, lr; };
    struct Hypers { double lr; };
    HD static void scalars(uint64_t, double gs, const Hypers& h, Scalars& s) { s.gs = rounded(gs), s.lr = rounded(h.lr); }
};
