// The update rule: `load` and `update` are those of numba.py and numpy.py, line for line.
//
// In front of this text: storage.cuh and the flags of the rule, each 0 or 1. Compile with --fmad=false: every line is
// one or more single IEEE operations in compute_t, as on the CPU. (CuPy always adds -ftz=true, so float32 subnormals
// may become zero.) Division and square root are the rounded ones, which is the compiler's default.

struct Scalars {
    compute_t lr, one_minus_rho, momentum, epsilon, weight_decay, lr_weight_decay, clipvalue;
};

// One gradient value as the rule takes it: limited to [-clipvalue, clipvalue] and times a factor.
__device__ __forceinline__ compute_t load(compute_t g, compute_t factor, const Scalars& s)
{
    if (CLIP_VALUE) {
        if (g > s.clipvalue)
            g = s.clipvalue;
        else if (g < -s.clipvalue)
            g = -s.clipvalue;
    }
    if (HAS_FACTOR)
        g = g * factor;
    return g;
}

// THE rule, of one element.
__device__ __forceinline__ void update(
    compute_t g, compute_t& var, compute_t& rms, compute_t& mom, compute_t& mg, const Scalars& s)
{
    if (MAXIMIZE)
        g = -g;
    if (L2)
        g = g + s.weight_decay * var;
    if (DECOUPLED)
        var = var - s.lr_weight_decay * var;

    rms = rms + (g * g - rms) * s.one_minus_rho;
    compute_t d = rms;
    if (CENTERED) {
        mg = mg + (g - mg) * s.one_minus_rho;
        d = rms - mg * mg;
        if (d < 0)  // keeps NaN, which fmax would swallow
            d = 0;
    }
    compute_t den;
    if (EPS_IN_SQRT)
        den = sqrt(d + s.epsilon);
    else
        den = sqrt(d) + s.epsilon;

    if (LR_IN_MOMENTUM)
        g = s.lr * g;
    compute_t u = g / den;
    compute_t step = u;
    if (HAS_MOMENTUM) {
        mom = s.momentum * mom + u;
        step = mom;
        if (NESTEROV)
            step = s.momentum * mom + u;
    }
    if (!LR_IN_MOMENTUM)
        step = step * s.lr;
    var = var - step;
}
