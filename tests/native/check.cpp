// Every kernel against plain loops in double precision, on memory of exactly the size it may touch: for the address and
// undefined-behaviour sanitizers, and for processors that are only emulated. Prints what differs; exit status 1 then.
// The argument is the number of threads, 2 without; the sum printed is over the bits of all results, the same for any.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels.h"

extern "C" {
const char* nex_available(int);
int nex_choose(const char*);
void nex_set_threads(int);
void nex_run(const NexCall*, int64_t);
}

template <class T>
static void run(NexCallKind kind, const T& arguments) {
    const NexCall call{&arguments, kind};
    nex_run(&call, 1);
}

static std::mt19937 source(7);
static int failures = 0;
static uint64_t bits_sum = 0;

static std::vector<float> noise(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> v(n);
    for (float& x : v) x = normal(source);
    return v;
}

static void check(const char* what, const char* isa, double found, double expected, double tolerance) {
    uint64_t bits;
    std::memcpy(&bits, &found, 8);
    bits_sum = bits_sum * 1099511628211u + bits;
    if (std::fabs(found - expected) <= tolerance * (1 + std::fabs(expected))) return;  // a NaN is not
    if (++failures < 20) std::printf("%s (%s): %g instead of %g\n", what, isa, found, expected);
}

static float rounded_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    u = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
    std::memcpy(&x, &u, 4);
    return x;
}

static double from_half(uint16_t h) {  // normal numbers only
    const double size = std::ldexp(1024 + (h & 1023), ((h >> 10) & 31) - 25);
    return h & 0x8000 ? -size : size;
}

// Weight [n, k] as numbers and packed.
struct Packed {
    std::vector<double> plain;
    std::vector<char> data;
    std::vector<float> scale;                        // INT8
    std::vector<uint16_t> half_scale, half_minimum;  // Q4
    NexWeight w{};
};

static Packed packed(int kind, int64_t n, int64_t k, bool gated) {
    Packed p;
    p.plain.resize(size_t(n * k));
    const int64_t half = n / 2, half_panels = (half + 15) / 16, panels = gated ? 2 * half_panels : (n + 15) / 16;
    auto row_of = [&](int64_t panel, int64_t lane) -> int64_t {
        if (!gated) return panel * 16 + lane < n ? panel * 16 + lane : -1;
        const int64_t r = panel % half_panels * 16 + lane;
        return r < half ? r + panel / half_panels * half : -1;
    };
    std::vector<float> values = noise(size_t(n * k));
    std::uniform_int_distribution<int> byte(-127, 127), nibble(0, 15);
    const int64_t groups = (k + 3) / 4;
    if (kind == NEX_F32) p.data.resize(size_t(panels * k * 64));
    if (kind == NEX_BF16) p.data.resize(size_t(panels * k * 32));
    if (kind == NEX_INT8) {
        p.data.resize(size_t(panels * groups * 64));
        p.scale = noise(size_t(panels * 16));
    }
    if (kind == NEX_Q4) {
        p.data.resize(size_t(panels * k * 8));
        p.half_scale.resize(size_t(panels * k / 2)), p.half_minimum.resize(p.half_scale.size());
        std::uniform_int_distribution<int> bits(0x3000, 0x4000), sign(0, 1);  // 0.125 to 2
        for (uint16_t& h : p.half_scale) h = uint16_t(bits(source) | sign(source) << 15);
        for (uint16_t& h : p.half_minimum) h = uint16_t(bits(source) | sign(source) << 15);
    }
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t lane = 0; lane < 16; ++lane)
            for (int64_t i = 0; i < k; ++i) {
                const int64_t row = row_of(panel, lane);
                const float x = row < 0 ? 0.0f : values[size_t(row * k + i)];
                double value = x;
                if (kind == NEX_F32) {
                    std::memcpy(&p.data[size_t(((panel * k + i) * 16 + lane) * 4)], &x, 4);
                } else if (kind == NEX_BF16) {
                    const float r = rounded_bf16(x);
                    std::memcpy(&p.data[size_t(((panel * k + i) * 16 + lane) * 2)], reinterpret_cast<const char*>(&r) + 2, 2);
                    value = r;
                } else if (kind == NEX_INT8) {
                    const int q = row < 0 ? 0 : byte(source);
                    p.data[size_t(((panel * groups + i / 4) * 16 + lane) * 4 + i % 4)] = char(q);
                    value = double(p.scale[size_t(panel * 16 + lane)]) * q;
                } else {
                    const int q = row < 0 ? 0 : nibble(source);
                    char& at = p.data[size_t(((panel * k / 8 + i / 8) * 16 + lane) * 4 + i % 4)];
                    at = char(at | (i % 8 < 4 ? q : q << 4));
                    const size_t block = size_t((panel * (k / 32) + i / 32) * 16 + lane);
                    value = from_half(p.half_scale[block]) * q + from_half(p.half_minimum[block]);
                }
                if (row >= 0) p.plain[size_t(row * k + i)] = value;
            }
    const bool q4 = kind == NEX_Q4;
    p.w = {p.data.data(), q4 ? static_cast<const void*>(p.half_scale.data()) : p.scale.data(),
           q4 ? p.half_minimum.data() : nullptr, nullptr, n, k, kind, 0};
    return p;
}

static void linear(const char* isa, int kind, int finish, int64_t rows, int64_t n, int64_t k, bool norm, bool bias,
                   bool integers = false) {
    Packed p = packed(kind, n, k, finish == NEX_GATED);
    std::vector<float> x = noise(size_t(rows * k)), weights = noise(size_t(k)), b = noise(size_t(n));
    const int64_t outputs = finish == NEX_GATED ? n / 2 : n;
    std::vector<float> out = noise(size_t(rows * outputs)), before = out;
    if (bias) p.w.bias = b.data();
    p.w.int8_activations = integers;
    NexLinear op{&p.w, x.data(), k, rows, norm ? weights.data() : nullptr, out.data(), outputs, 1e-5f, finish};
    run(NEX_LINEAR, op);
    for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> y(static_cast<size_t>(n)), size(y);
        double squares = 0, largest = 0;
        for (int64_t i = 0; i < k; ++i) squares += double(x[size_t(r * k + i)]) * x[size_t(r * k + i)];
        const double factor = 1 / std::sqrt(squares / double(k) + 1e-5);
        for (int64_t i = 0; i < k; ++i)
            largest = std::max(largest, std::fabs(x[size_t(r * k + i)] * (norm ? factor * weights[size_t(i)] : 1.0)));
        for (int64_t j = 0; j < n; ++j) {
            double sum = bias ? b[size_t(j)] : 0;
            for (int64_t i = 0; i < k; ++i) size[size_t(j)] += p.plain[size_t(j * k + i)] * p.plain[size_t(j * k + i)];
            for (int64_t i = 0; i < k; ++i)
                sum += x[size_t(r * k + i)] * (norm ? factor * weights[size_t(i)] : 1.0) * p.plain[size_t(j * k + i)];
            y[size_t(j)] = sum;
        }
        const double wide = kind >= NEX_INT8 ? 100 : 1;  // integers as large as 127 times a scale
        for (int64_t j = 0; j < outputs; ++j) {
            double expected = y[size_t(j)], allowed = 3e-5 * wide;
            if (finish == NEX_GATED) expected = expected / (1 + std::exp(-expected)) * y[size_t(j + outputs)];
            if (finish == NEX_ADD) expected += before[size_t(r * outputs + j)];
            // rounding x to 8 bits: independent errors of largest / 127 / sqrt(12), 7 standard deviations
            if (integers) allowed = 7 * largest / 127 / std::sqrt(12.0) * std::sqrt(size[size_t(j)]) / (1 + std::fabs(expected));
            check("linear", isa, out[size_t(r * outputs + j)], expected, allowed);
        }
    }
}

static void embedding(const char* isa, int kind) {
    const int64_t n = 37, k = 64;
    Packed p = packed(kind, n, k, false);
    std::vector<int64_t> ids = {36, 0, 17, 16, 36};
    std::vector<float> out(ids.size() * size_t(k));
    run(NEX_EMBED, NexEmbed{&p.w, ids.data(), out.data(), int64_t(ids.size())});
    for (size_t r = 0; r < ids.size(); ++r)
        for (int64_t i = 0; i < k; ++i) check("embed", isa, out[r * size_t(k) + size_t(i)], p.plain[size_t(ids[r] * k + i)], 1e-5);
}

struct Row {
    int64_t queries, length;
};

// A row of the cache against the numbers it was written from, which become what it holds: attention is then to be exact
// over these. 8 bits: the largest number is 127 of the scale, and none is off by more than half of one.
static void kept(const char* isa, int kind, const char* row, float* numbers, int64_t dim) {
    if (kind == NEX_F32) {
        if (std::memcmp(row, numbers, size_t(dim) * 4) != 0) check("kept", isa, 1, 0, 0);
        return;
    }
    float scale = 0, largest = 0;
    if (kind == NEX_INT8) {
        std::memcpy(&scale, row + dim, 4);
        for (int64_t i = 0; i < dim; ++i) largest = std::max(largest, std::fabs(numbers[i]));
        check("scale", isa, scale * 127 / largest, 1, 1e-6);
    }
    for (int64_t i = 0; i < dim; ++i) {
        uint32_t upper = 0;
        std::memcpy(reinterpret_cast<char*>(&upper) + 2, row + 2 * i, kind == NEX_BF16 ? 2 : 0);
        float number;
        std::memcpy(&number, &upper, 4);
        if (kind == NEX_BF16) check("kept", isa, number, rounded_bf16(numbers[i]), 0);
        else number = float(int8_t(row[i])) * scale, check("kept, in scales", isa, (number - numbers[i]) / scale, 0, 0.5001);
        numbers[i] = number;
    }
}

// Rotation, store and attention of a batch: everything but the last `queries` tokens of a row is in the cache before.
static void attention(const char* isa, int kind, int64_t heads, int64_t kv_heads, int64_t dim, int32_t size, std::vector<Row> rows) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const int64_t element = kind == NEX_F32 ? 4 : kind == NEX_BF16 ? 2 : 1;
    const int64_t head_bytes = dim * element + (kind == NEX_INT8 ? 4 : 0), token = head_bytes * kv_heads, block = token * size;
    int64_t blocks = 1, tokens = 0, widest = 1;
    for (const Row& r : rows) {
        blocks += (r.length + size - 1) / size, tokens += r.queries;
        widest = std::max(widest, (r.length + size - 1) / size);
    }
    std::vector<char> k_cache(size_t(blocks * block), char(0xff)), v_cache(k_cache);  // 0xff.. is NaN in every type
    if (kind == NEX_INT8)
        for (auto* cache : {&k_cache, &v_cache})
            for (size_t at = size_t(dim); at < cache->size(); at += size_t(head_bytes)) std::memcpy(&(*cache)[at], &nan, 4);
    std::vector<int32_t> table(rows.size() * size_t(widest), 0), lengths, starts = {0};
    int32_t next = int32_t(blocks) - 1;
    for (size_t r = 0; r < rows.size(); ++r) {
        for (int64_t b = 0; b * size < rows[r].length; ++b) table[r * size_t(widest) + size_t(b)] = next--;
        lengths.push_back(int32_t(rows[r].length));
        starts.push_back(starts.back() + int32_t(rows[r].queries));
    }
    const int64_t width = (heads + 2 * kv_heads) * dim;
    NexCache cache{k_cache.data(), v_cache.data(), block, token, head_bytes, kind, size};
    // all tokens of all rows go through rotate_store; the queries are those of the last ones
    std::vector<std::vector<float>> q(rows.size()), k(rows.size()), v(rows.size());
    std::vector<float> queries;
    for (size_t r = 0; r < rows.size(); ++r) {
        const int64_t n = rows[r].length;
        std::vector<float> qkv = noise(size_t(n * width)), angles = noise(size_t(n * dim / 2)), cos, sin;
        for (float a : angles) cos.push_back(std::cos(a)), sin.push_back(std::sin(a));
        std::vector<int64_t> slots, positions;
        for (int64_t t = 0; t < n; ++t) positions.push_back(n - 1 - t);  // rows of the tables in any order
        for (int64_t t = 0; t < n; ++t) slots.push_back(table[r * size_t(widest) + size_t(t / size)] * size + t % size);
        std::vector<float> turned(qkv);
        for (int64_t t = 0; t < n; ++t)
            for (int64_t h = 0; h < heads + kv_heads; ++h)
                for (int64_t i = 0; i < dim / 2; ++i) {
                    const size_t a = size_t(t * width + h * dim + i), b = a + size_t(dim / 2), c = size_t((n - 1 - t) * (dim / 2) + i);
                    turned[a] = qkv[a] * cos[c] - qkv[b] * sin[c];
                    turned[b] = qkv[b] * cos[c] + qkv[a] * sin[c];
                }
        NexRotateStore op{qkv.data(), cos.data(), sin.data(), positions.data(), slots.data(), cache, n, heads, kv_heads, dim};
        run(NEX_ROTATE_STORE, op);
        for (size_t i = 0; i < qkv.size(); ++i) check("rotate", isa, qkv[i], turned[i], 1e-5);
        for (int64_t t = 0; t < n; ++t) {
            const float* row = &qkv[size_t(t * width)];
            if (t >= n - rows[r].queries) queries.insert(queries.end(), row, row + heads * dim);
            q[r].insert(q[r].end(), row, row + heads * dim);
            k[r].insert(k[r].end(), row + heads * dim, row + (heads + kv_heads) * dim);
            v[r].insert(v[r].end(), row + (heads + kv_heads) * dim, row + width);
        }
        for (int64_t t = 0; t < n; ++t)
            for (int64_t h = 0; h < kv_heads; ++h) {
                const size_t at = size_t(slots[size_t(t)] / size * block + slots[size_t(t)] % size * token + h * head_bytes);
                kept(isa, kind, &k_cache[at], &k[r][size_t((t * kv_heads + h) * dim)], dim);
                kept(isa, kind, &v_cache[at], &v[r][size_t((t * kv_heads + h) * dim)], dim);
            }
    }
    std::vector<float> out(size_t(tokens * heads * dim), nan);
    NexAttention op{queries.data(), heads * dim, out.data(), heads * dim, cache, table.data(), widest, lengths.data(), starts.data(),
                    int64_t(rows.size()), heads, kv_heads, dim, 1 / std::sqrt(float(dim))};
    run(NEX_ATTENTION, op);
    // over bfloat16 some sets round q and the weights alike, by 2^-9 each; the others, and all over 8 bits, compute in float
    const double tolerance = kind == NEX_BF16 ? 1e-2 : 2e-5;
    for (size_t r = 0; r < rows.size(); ++r)
        for (int64_t i = 0; i < rows[r].queries; ++i)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t at = rows[r].length - rows[r].queries + i, kv = h / (heads / kv_heads);
                std::vector<double> p;
                double highest = -1e300, total = 0;
                for (int64_t t = 0; t <= at; ++t) {
                    double s = 0;
                    for (int64_t d = 0; d < dim; ++d)
                        s += double(q[r][size_t((at * heads + h) * dim + d)]) * k[r][size_t((t * kv_heads + kv) * dim + d)];
                    p.push_back(s / std::sqrt(double(dim)));
                    highest = std::max(highest, p.back());
                }
                for (double& x : p) total += x = std::exp(x - highest);
                for (int64_t d = 0; d < dim; ++d) {
                    double mixed = 0;
                    for (int64_t t = 0; t <= at; ++t) mixed += p[size_t(t)] * v[r][size_t((t * kv_heads + kv) * dim + d)];
                    check("attention", isa, out[size_t(((starts[r] + i) * heads + h) * dim + d)], mixed / total, tolerance);
                }
            }
}

int main(int count, char** arguments) {
    nex_set_threads(count > 1 ? std::atoi(arguments[1]) : 2);
    int sets = 0;
    for (const char* isa; (isa = nex_available(sets)) != nullptr; ++sets) {
        nex_choose(isa);
        for (int kind : {NEX_F32, NEX_BF16, NEX_INT8, NEX_Q4}) {
            for (int64_t rows : {1, 4, 5, 12, 13, 31}) linear(isa, kind, NEX_STORE, rows, 50, 64, rows % 2 == 0, rows % 3 == 0);
            linear(isa, kind, NEX_GATED, 7, 72, 96, true, true);
            linear(isa, kind, NEX_ADD, 3, 16, 160, false, false);
            linear(isa, kind, NEX_ADD, 300, 33, 32, false, true);
            embedding(isa, kind);
        }
        for (int kind : {NEX_INT8, NEX_Q4}) {
            for (int64_t rows : {1, 2, 4, 5, 12, 13, 31}) linear(isa, kind, NEX_STORE, rows, 50, 96, rows % 2 == 0, rows % 3 == 0, true);
            linear(isa, kind, NEX_ADD, 130, 33, 160, true, true, true);
            linear(isa, kind, NEX_STORE, 210, 72, 96, true, true, true);  // enough rows that threads share them out
            linear(isa, kind, NEX_STORE, 3, 7, 32, true, true, true);
        }
        for (int64_t k : {1, 2, 5, 19, 66}) linear(isa, NEX_INT8, NEX_STORE, 6, 20, k, false, false, true);
        for (int64_t k : {1, 3, 18, 1025}) linear(isa, NEX_F32, NEX_STORE, 6, 20, k, true, false), linear(isa, NEX_INT8, NEX_STORE, 2, 20, k, false, false);
        for (int kind : {NEX_F32, NEX_BF16, NEX_INT8})
            for (int64_t dim : {6, 64, 80, 128})
                for (int64_t kv_heads : {1, 2, 6})
                    attention(isa, kind, 6, kv_heads, dim, dim == 80 ? 1 : 16, {{1, 1}, {1, 17}, {1, 64}, {5, 5}, {40, 70}});
        attention(isa, NEX_F32, 3, 1, 256, 16, {{1, 1200}, {130, 130}, {1, 600}});
        attention(isa, NEX_BF16, 6, 2, 64, 16, {{130, 130}, {65, 200}, {1, 600}});
        for (int64_t columns : {1, 63, 64, 200}) {
            std::vector<float> scores = noise(size_t(4 * columns));
            std::vector<int64_t> places(4), expected(4);
            for (int64_t r = 0; r < 3; ++r) {
                auto begin = scores.begin() + r * columns;
                expected[size_t(r)] = std::max_element(begin, begin + columns) - begin;
            }
            scores[size_t(4 * columns - 1)] = columns % 2 ? INFINITY : NAN, expected[3] = -1;
            run(NEX_LARGEST, NexLargest{scores.data(), places.data(), 4, columns});
            for (size_t r = 0; r < 4; ++r) check("largest", isa, double(places[r]), double(expected[r]), 0);
        }
        std::vector<float> x = noise(5 * 19), w = noise(19), out(x.size());
        run(NEX_NORM, NexNorm{x.data(), w.data(), out.data(), 5, 19, 1e-6f});
        for (size_t r = 0; r < 5; ++r) {
            double squares = 0;
            for (size_t i = 0; i < 19; ++i) squares += double(x[r * 19 + i]) * x[r * 19 + i];
            for (size_t i = 0; i < 19; ++i) check("rms_norm", isa, out[r * 19 + i], x[r * 19 + i] / std::sqrt(squares / 19 + 1e-6) * w[i], 1e-5);
        }
    }
    std::printf("sum of bits %016llx\n%d instruction sets, %d differences\n", (unsigned long long)bits_sum, sets, failures);
    return failures != 0 || sets == 0;
}
