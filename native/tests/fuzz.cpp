// Calls every function of normfuse.h with random shapes, values and mistakes, on every instruction set of the machine.
// Built with sanitizers (`make sanitize`): buffers have exactly the sizes that the header names, so that a read or
// write beyond them is found. Integers are compared with a plain computation.
//
//   fuzz [cases] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "normfuse.h"

namespace {

uint64_t state = 1;
uint64_t current_case = 0;
const char* current_call = "";

uint64_t next() {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
int64_t between(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
bool one_in(int64_t n) { return between(1, n) == 1; }

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "case %llu, %s on %s: %s\n", static_cast<unsigned long long>(current_case), current_call,
               nf_isa(), text.c_str());
  std::abort();
}
void check(bool holds, const char* text) {
  if (!holds) fail(text);
}

// Exactly so many elements, at an address that is only as aligned as the type needs.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count > 0 ? count : 0), shift_(int64_t(sizeof(T)) * between(0, 3)) {
    memory_ = static_cast<char*>(std::malloc(size_t(shift_ + count_ * int64_t(sizeof(T)))));
    if (!memory_) std::abort();
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  T* data() { return reinterpret_cast<T*>(memory_ + shift_); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  char* memory_;
  int64_t count_, shift_;
};

float value(int kind) {
  const float unit = float(int64_t(next() >> 40)) / float(1 << 23) - 1;
  if (kind == 0) return unit;
  static const float odd[] = {0.0f, -0.0f, 1e-45f, -1e-38f, 1e-30f, 3e38f, -3e38f, 1e5f, -1e5f, 0.5f, 127.5f};
  if (kind >= 2 && one_in(20))
    return one_in(2) ? std::numeric_limits<float>::quiet_NaN()
                     : (one_in(2) ? 1.0f : -1.0f) * std::numeric_limits<float>::infinity();
  return one_in(4) ? odd[next() % (sizeof odd / sizeof *odd)] : unit * std::ldexp(1.0f, int(between(-60, 60)));
}
void fill(Buffer<float>& b) {
  const int kind = int(between(0, 2));
  for (int64_t i = 0; i < b.size(); ++i) b[i] = value(kind);
  if (one_in(10))
    for (int64_t i = 0; i < b.size(); ++i) b[i] = 0;
}
void fill(Buffer<int8_t>& b) {
  for (int64_t i = 0; i < b.size(); ++i) b[i] = int8_t(between(-127, 127));
}

const nf_threads* some_threads() {
  static const int counts[] = {1, 1, 2, 3, 4};
  return nf_pool(counts[next() % 5]);
}
int64_t some_size(int64_t most) { return one_in(12) ? 0 : one_in(3) ? between(1, 4) : between(1, most); }
int32_t some_bits() { return one_in(25) ? int32_t(between(-2, 12)) : int32_t(between(2, 8)); }
int32_t some_epilogue() { return one_in(40) ? int32_t(between(-3, 9)) : int32_t(between(0, 4)); }
bool bits_are_right(int32_t bits) { return bits >= 2 && bits <= 8; }

// -- weights --------------------------------------------------------------------------------------

struct Weight {
  nf_weight w{};
  bool right = true;                           // no mistake in it
  std::vector<int32_t> sizes, order, operand;  // operand [n][k]: C << (E - e)
  Buffer<uint8_t>* packed = nullptr;
  Buffer<float>*scale = nullptr, *bias = nullptr;
  Buffer<int8_t>* multipliers = nullptr;
  ~Weight() {
    delete packed;
    delete multipliers;
    delete scale;
    delete bias;
  }

  void make(int64_t n, int64_t k, bool may_be_wrong, bool with_blocks = true) {
    w.n = n;
    w.k = k;
    w.bits = between(2, 8);
    const int64_t top = (1 << (w.bits - 1)) - 1;
    int most = 0;  // the largest shift with which no sum leaves 32 bits
    while (most < 15 && (k + 1) * 127 * top * (int64_t(2) << most) < (int64_t(1) << 31)) ++most;
    w.groups = one_in(3) ? 1 : int32_t(between(1, most + 1));
    std::vector<int> exponent(size_t(k), 0);
    for (auto& e : exponent) e = int(between(0, w.groups - 1));
    exponent[size_t(between(0, k - 1))] = w.groups - 1;
    sizes.assign(size_t(w.groups), 0);
    for (const int e : exponent) ++sizes[size_t(e)];
    for (int e = 0; e < w.groups; ++e)
      for (int64_t i = 0; i < k; ++i)
        if (exponent[size_t(i)] == e) order.push_back(int32_t(i));
    // Any bytes are codes, but for one value that symmetric codes leave out.
    const int64_t bytes = nf_packed_bytes(n, w.bits, w.groups, sizes.data());
    check(bytes > 0, "nf_packed_bytes refuses a weight");
    std::vector<int32_t> code(size_t(n * k));
    for (auto& c : code) c = int32_t(between(-top, top));
    packed = new Buffer<uint8_t>(bytes);
    pack(code, top);
    operand.resize(code.size());
    for (int64_t i = 0; i < n * k; ++i)
      operand[size_t(i)] = code[size_t(i)] * (1 << (w.groups - 1 - exponent[size_t(i % k)]));
    scale = new Buffer<float>(n);
    fill(*scale);
    if (one_in(2)) fill(*(bias = new Buffer<float>(n)));
    w.sizes = sizes.data();
    w.order = w.groups == 1 && one_in(2) ? nullptr : order.data();
    if (w.groups == 1) w.order = nullptr;
    w.packed = packed->data();
    w.scale = scale->data();
    w.bias = bias ? bias->data() : nullptr;
    if (with_blocks && w.bits <= 4 && w.groups == 1 && one_in(2)) multiply(code);
    if (may_be_wrong && one_in(25)) spoil();
  }

  // Multipliers of blocks, of any value that keeps codes within a byte.
  void multiply(const std::vector<int32_t>& code) {
    w.block = int32_t(32 << between(0, 3));
    const int64_t blocks = (w.k + w.block - 1) / w.block;
    multipliers = new Buffer<int8_t>((w.n + 15) / 16 * blocks * 16);
    const int64_t most = 127 >> (w.bits - 1);
    for (int64_t i = 0; i < multipliers->size(); ++i)
      multipliers->data()[i] = int8_t(one_in(2) ? between(1, most) : -between(1, most));
    w.multipliers = multipliers->data();
    for (int64_t i = 0; i < w.n * w.k; ++i) {
      const int64_t row = i / w.k, at = (row / 16 * blocks + i % w.k / w.block) * 16 + row % 16;
      operand[size_t(i)] = code[size_t(i)] * multipliers->data()[at];
    }
  }

  // Layout as the header describes it, one bit of a code at a time.
  void pack(const std::vector<int32_t>& code, int64_t top) {
    const int units[] = {0, 0, 4, 8, 2, 8, 4, 8, 1};
    std::vector<int64_t> slot(size_t(w.k));  // of a sorted position: quad * 4 + channel in quad
    int64_t quads = 0, position = 0;
    for (const int32_t size : sizes) {
      for (int32_t i = 0; i < size; ++i) slot[size_t(position++)] = quads * 4 + i;
      quads += (size + 3) / 4;
    }
    quads = (quads + units[w.bits] - 1) / units[w.bits] * units[w.bits];
    const int64_t panels = (w.n + 15) / 16;
    check(packed->size() == panels * quads * 8 * w.bits, "nf_packed_bytes is not what the layout needs");
    std::vector<int64_t> at(size_t(quads * 4), -1);
    for (int64_t i = 0; i < w.k; ++i) at[size_t(slot[size_t(i)])] = order[size_t(i)];
    uint8_t* out = packed->data();
    for (int64_t panel = 0; panel < panels; ++panel) {
      int low = 0;
      for (const int width : {8, 4, 2, 1}) {
        if (!(w.bits & width)) continue;
        const int64_t held = 8 / width;
        for (int64_t block = 0; block < quads / held; ++block)
          for (int64_t byte = 0; byte < 64; ++byte) {
            uint8_t v = 0;
            for (int64_t h = 0; h < held; ++h) {
              const int64_t row = panel * 16 + byte / 4, channel = at[size_t((block * held + h) * 4 + byte % 4)];
              const int32_t c = row < w.n && channel >= 0 ? code[size_t(row * w.k + channel)] : 0;
              v = uint8_t(v | (((c + top + 1) >> low) & ((1 << width) - 1)) << (h * width));
            }
            *out++ = v;
          }
        low += width;
      }
    }
  }

  void spoil() {
    right = false;
    switch (between(0, 12)) {
      case 0: w.bits = int32_t(one_in(2) ? between(-3, 1) : between(9, 70)); break;
      case 1: w.groups = int32_t(one_in(2) ? between(-3, 0) : between(17, 1000)); break;
      case 2: sizes[0] += 1; break;
      case 3: sizes[0] = -1; break;
      case 4: w.n = between(-2, 0); break;
      case 5: w.k = between(-2, 0); break;
      case 6: w.sizes = nullptr; break;
      case 7: w.packed = nullptr; break;
      case 8: w.scale = nullptr; break;
      case 9: w.n = std::numeric_limits<int64_t>::max() - between(0, 20); break;
      case 10: w.k = std::numeric_limits<int64_t>::max() - between(0, 20); break;
      case 11:
        if (w.order) {
          const int64_t at = between(0, w.k - 1);
          order[size_t(at)] = int32_t(one_in(2)   ? w.k + between(0, 3)
                                      : one_in(2) ? std::numeric_limits<int32_t>::min()
                                                  : -between(1, 3));
          break;
        }
        [[fallthrough]];
      default: w.k += 1;
    }
  }
};

void expect(const char* message, bool right) {
  if (right && message) fail(std::string("refused: ") + message);
  if (!right && !message) fail("a mistake was accepted");
}

// -- functions ------------------------------------------------------------------------------------

void quantize_rows() {
  current_call = "nf_quantize_rows";
  const int64_t rows = some_size(9), k = some_size(300);
  const int32_t bits = some_bits();
  Buffer<float> x(rows * k), scale(rows);
  Buffer<int8_t> q(rows * k);
  fill(x);
  const char* message = nf_quantize_rows(some_threads(), x.data(), rows, k, bits, q.data(), scale.data());
  if (!bits_are_right(bits)) return expect(message, false);
  if (k) expect(message, true);
  if (message) return;
  const float top = float((1 << (bits - 1)) - 1);
  for (int64_t r = 0; r < rows; ++r) {
    float most = 0;
    bool finite = true;
    for (int64_t i = 0; i < k; ++i) {
      finite = finite && std::isfinite(x[r * k + i]);
      most = std::fmax(most, std::fabs(x[r * k + i]));
    }
    check(finite ? scale[r] == (most == 0 ? 1 : most / top) : std::isnan(scale[r]),
          "the scale of a row is not its definition");
    for (int64_t i = 0; i < k; ++i)
      check(std::abs(q[r * k + i]) <= int(top) && (finite || q[r * k + i] == 0), "a code is out of range");
  }
}

void quantize_static() {
  current_call = "nf_quantize_static";
  const int64_t count = some_size(500);
  const int32_t bits = some_bits();
  const float scale = one_in(10) ? value(2) : std::ldexp(1.0f, int(between(-20, 20)));
  Buffer<float> x(count);
  Buffer<int8_t> q(count);
  fill(x);
  const char* message = nf_quantize_static(some_threads(), x.data(), count, scale, bits, q.data());
  if (!bits_are_right(bits) || message) {
    if (!bits_are_right(bits)) expect(message, false);
    else check(!(scale > 0 && std::isfinite(scale)), "a right scale was refused");
    return;
  }
  const int top = (1 << (bits - 1)) - 1;
  for (int64_t i = 0; i < count; ++i)
    check(std::abs(q[i]) <= top && (!std::isnan(x[i]) || q[i] == 0), "a code is out of range");
}

void products() {
  const int64_t n = between(1, one_in(4) ? 200 : 40), k = between(1, one_in(4) ? 400 : 70),
                m = some_size(one_in(4) ? 40 : 9);
  Weight weight;
  weight.make(n, k, true);
  Buffer<int8_t> q(m * k);
  fill(q);
  const int64_t stride = between(0, 1);
  Buffer<float> row_scale(stride ? m : 1), y(m * n);
  fill(row_scale);
  const int32_t epilogue = some_epilogue();
  const bool right = weight.right && epilogue >= 0 && epilogue <= 4;
  Buffer<float> residual(m * n);
  fill(residual);
  fill(y);
  const float* add = one_in(2) ? nullptr : one_in(2) ? y.data() : residual.data();
  const nf_threads* threads = some_threads();
  switch (between(0, 3)) {
    case 0: {
      current_call = "nf_matmul_i32";
      Buffer<int32_t> acc(m * n);
      expect(nf_matmul_i32(threads, &weight.w, q.data(), m, acc.data()), weight.right);
      if (!weight.right) return;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          int32_t sum = 0;
          for (int64_t c = 0; c < k; ++c) sum += q[i * k + c] * weight.operand[size_t(j * k + c)];
          check(acc[i * n + j] == sum, "a sum is wrong");
        }
      return;
    }
    case 1:
      current_call = "nf_matmul";
      return expect(nf_matmul(threads, &weight.w, q.data(), row_scale.data(), stride, m, epilogue, add, y.data()),
                    right);
    case 2: {
      current_call = "nf_matmul_quantize";
      Buffer<int8_t> out(m * n);
      Buffer<float> out_scale(m);
      const int32_t bits = some_bits();
      return expect(nf_matmul_quantize(threads, &weight.w, q.data(), row_scale.data(), stride, m, epilogue, bits,
                                       out.data(), out_scale.data()),
                    right && bits_are_right(bits));
    }
    default: {
      current_call = "nf_linear";
      Buffer<float> x(m * k);
      fill(x);
      const int32_t bits = some_bits();
      const float scale = one_in(2) ? 0 : std::ldexp(1.0f, int(between(-20, 20)));
      expect(nf_linear(threads, &weight.w, x.data(), m, bits, scale, epilogue, add, y.data()),
             right && bits_are_right(bits));
    }
  }
}

// One argument that no call can be right with.
void mistakes() {
  Weight weight;
  weight.make(between(1, 20), between(1, 40), false);
  const nf_weight& w = weight.w;
  const int64_t huge = std::numeric_limits<int64_t>::max() - between(0, 5);
  Buffer<int8_t> q(w.k), out(w.n);
  Buffer<float> x(w.k), y(w.n), scale(1);
  Buffer<int32_t> acc(w.n);
  fill(q);
  fill(x);
  scale[0] = 1;
  const nf_threads* t = some_threads();
  const int64_t m = one_in(2) ? -between(1, 5) : one_in(2) ? huge : huge / between(1, 4);
  int8_t *no_codes = nullptr, *codes = q.data();
  float *none = nullptr, *s = scale.data(), *floats = y.data();
  const char* message = nullptr;
  switch (between(0, 20)) {
    case 0: message = nf_matmul(t, nullptr, codes, s, 1, 1, 0, none, floats); break;
    case 1: message = nf_matmul(t, &w, codes, s, 1, m, 0, none, floats); break;
    case 2: message = nf_matmul(t, &w, no_codes, s, 1, 1, 0, none, floats); break;
    case 3: message = nf_matmul(t, &w, codes, none, 1, 1, 0, none, floats); break;
    case 4: message = nf_matmul(t, &w, codes, s, 1, 1, 0, none, none); break;
    case 5: message = nf_matmul(t, &w, codes, s, one_in(2) ? 2 : huge, 1, 0, none, floats); break;
    case 6: message = nf_matmul_quantize(t, &w, codes, s, 1, m, 0, 8, out.data(), s); break;
    case 7: message = nf_matmul_quantize(t, &w, codes, s, 1, 1, 0, 8, no_codes, s); break;
    case 8: message = nf_matmul_quantize(t, &w, codes, s, 1, 1, 0, 8, out.data(), none); break;
    case 9: message = nf_linear(t, &w, x.data(), m, 8, 0.f, 0, none, floats); break;
    case 10: message = nf_linear(t, &w, none, 1, 8, 0.f, 0, none, floats); break;
    case 11: message = nf_linear(t, &w, x.data(), 1, 8, 0.f, 0, none, none); break;
    case 12: message = nf_matmul_i32(t, &w, codes, m, acc.data()); break;
    case 13: message = nf_matmul_i32(t, &w, codes, 1, nullptr); break;
    case 14: message = nf_matmul_i32(t, nullptr, codes, 1, acc.data()); break;
    case 15: message = nf_quantize_rows(t, x.data(), m, w.k + 8, 8, codes, s); break;
    case 16: message = nf_quantize_rows(t, x.data(), 1, one_in(2) ? 0 : -1, 8, codes, s); break;
    case 17: message = nf_quantize_rows(t, one_in(2) ? none : x.data(), 1, w.k, 8, no_codes, s); break;
    case 18: message = nf_quantize_static(t, x.data(), one_in(2) ? -1 : huge, 1.f, 8, codes); break;
    case 19:
      message =
          nf_quantize_static(t, x.data(), w.k, one_in(2) ? -1.f : std::numeric_limits<float>::quiet_NaN(), 8, codes);
      break;
    default: message = nf_force_isa("mmx");
  }
  current_call = "a call with a mistake";
  expect(message, false);
}

void conv() {
  current_call = "nf_conv2d";
  nf_conv c{};
  c.conv_groups = one_in(3) ? between(1, 3) : 1;
  const int64_t channels = between(1, 6), outputs = between(1, 20);
  c.batch = some_size(2);
  c.c = channels * c.conv_groups;
  c.h = between(1, 10);
  c.w = between(1, 10);
  c.kh = between(1, 4);
  c.kw = between(1, 4);
  for (int i = 0; i < 2; ++i) {
    c.stride[i] = between(1, 3);
    c.pad_begin[i] = between(0, 3);
    c.pad_end[i] = between(0, 3);
    c.dilation[i] = between(1, 3);
  }
  const int64_t oh = c.h + c.pad_begin[0] + c.pad_end[0] - c.dilation[0] * (c.kh - 1) - 1;
  const int64_t ow = c.w + c.pad_begin[1] + c.pad_end[1] - c.dilation[1] * (c.kw - 1) - 1;
  bool right = oh >= 0 && ow >= 0;
  std::vector<Weight> made(size_t(c.conv_groups));
  std::vector<nf_weight> weights;
  for (auto& w : made) {
    w.make(outputs, channels * c.kh * c.kw, c.conv_groups == 1, false);
    right = right && w.right;
    weights.push_back(w.w);
  }
  const int64_t count = right ? c.batch * outputs * c.conv_groups * (oh / c.stride[0] + 1) * (ow / c.stride[1] + 1) : 0;
  Buffer<float> x(c.batch * c.c * c.h * c.w), y(count);
  fill(x);
  if (one_in(25)) {
    right = false;
    switch (between(0, 7)) {
      case 0: c.stride[between(0, 1)] = between(-2, 0); break;
      case 1: c.dilation[between(0, 1)] = one_in(2) ? 0 : std::numeric_limits<int64_t>::max(); break;
      case 2: c.pad_begin[between(0, 1)] = one_in(2) ? -1 : std::numeric_limits<int64_t>::max(); break;
      case 3: c.pad_end[between(0, 1)] = -1; break;
      case 4: c.kh = between(-1, 0); break;
      case 5: c.conv_groups = between(-1, 0); break;
      case 6: c.c += 1; break;
      default: c.h = between(-1, 0);
    }
  }
  const int32_t bits = some_bits(), epilogue = some_epilogue();
  const float scale = one_in(2) ? 0 : 0.125f;
  right = right && bits_are_right(bits) && epilogue >= 0 && epilogue <= 4;
  const char* message = nf_conv2d(some_threads(), &c, weights.data(), x.data(), bits, scale, epilogue, y.data());
  if (c.batch > 0) expect(message, right);
}

// -- codes ----------------------------------------------------------------------------------------

void fill(Buffer<uint8_t>& b) {
  for (int64_t i = 0; i < b.size(); ++i) b[i] = uint8_t(next());
}
int32_t some_code() { return int32_t(between(0, 255)); }
int64_t places(const nf_codes_conv& c, int axis) {
  const int64_t size = axis ? c.w : c.h, kernel = axis ? c.kw : c.kh;
  return (size + c.pad_begin[axis] + c.pad_end[axis] - c.dilation[axis] * (kernel - 1) - 1) / c.stride[axis] + 1;
}

nf_codes_conv some_window(bool pool) {
  nf_codes_conv c{};
  c.batch = some_size(2);
  c.h = between(1, 12);
  c.w = between(1, 12);
  c.kh = between(1, 5);
  c.kw = one_in(2) ? c.kh : between(1, 5);
  for (int i = 0; i < 2; ++i) {
    c.stride[i] = between(1, 3);
    c.dilation[i] = pool || one_in(2) ? 1 : between(1, 2);
    const int64_t reach = (i ? c.kw : c.kh) * c.dilation[i];
    c.pad_begin[i] = one_in(2) ? 0 : between(0, pool ? std::min<int64_t>(3, reach - 1) : 3);
    c.pad_end[i] = one_in(2) ? 0 : between(0, pool ? std::min<int64_t>(3, reach - 1) : 3);
  }
  if (one_in(3)) c.stride[1] = c.stride[0] = between(1, 2);
  c.groups = 1;
  c.high = 255;
  return c;
}

bool fits(const nf_codes_conv& c) {
  return c.h + c.pad_begin[0] + c.pad_end[0] > c.dilation[0] * (c.kh - 1) &&
         c.w + c.pad_begin[1] + c.pad_end[1] > c.dilation[1] * (c.kw - 1);
}

uint8_t rounded(float v, int32_t low, int32_t high) {
  const float r = std::nearbyint(v);
  return uint8_t(r < float(low) ? low : r > float(high) ? high : int32_t(r));
}

void codes_conv() {
  current_call = "nf_codes_conv2d";
  nf_codes_conv c = some_window(false);
  const int64_t kind = between(0, 3);
  c.groups = kind == 0 ? between(1, 80) : kind == 1 ? between(1, 3) : 1;
  const int64_t channels = kind == 0 ? 1 : one_in(2) ? 4 * between(1, 5) : between(1, 9);
  const int64_t outputs = kind == 0 && !one_in(4) ? 1 : between(1, one_in(3) ? 150 : 20);
  c.c = channels * c.groups;
  c.outputs = outputs * c.groups;
  c.zero = some_code();
  c.low = int32_t(between(0, 100));
  c.high = int32_t(between(100, 255));
  c.residual_scale = one_in(2) ? 0.f : 0.375f;
  c.function = one_in(2) ? 0 : int32_t(between(1, 2));
  c.gain = 1.5f;
  c.offset = 7.f;
  const int64_t k = c.kh * c.kw * channels;
  Buffer<int8_t> weights(c.outputs * k);
  Buffer<float> scale(c.outputs), bias(c.outputs);
  const int64_t top = one_in(2) ? 128 : 60;
  for (int64_t i = 0; i < weights.size(); ++i) weights[i] = int8_t(between(-top, top - 1));
  for (int64_t i = 0; i < c.outputs; ++i) {
    scale[i] = 1.f / float(k * between(10, 200));
    bias[i] = float(between(-1000, 3000)) / 10;
  }
  const int64_t bytes = nf_codes_bytes(&c);
  check(bytes > 0, "nf_codes_bytes refuses a convolution");
  std::vector<uint8_t> memory(size_t(bytes + 64));
  uint8_t* packed = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63);
  expect(nf_codes_pack(some_threads(), &c, weights.data(), scale.data(), bias.data(), packed), true);
  const bool right = fits(c), depthwise = channels == 1 && outputs == 1 && c.groups > 1;
  const int64_t oh = right ? places(c, 0) : 0, ow = right ? places(c, 1) : 0;
  Buffer<uint8_t> x(c.batch * c.h * c.w * c.c), y(c.batch * oh * ow * c.outputs), residual(y.size()), table(256);
  fill(x), fill(residual), fill(table);
  const bool adds = one_in(3), looks = one_in(3);
  nf_codes_conv wrong = c;
  if (one_in(25)) {
    switch (between(0, 5)) {
      case 0: wrong.groups = between(-1, 0); break;
      case 1: wrong.zero = one_in(2) ? -1 : 256; break;
      case 2: wrong.low = wrong.high + 1; break;
      case 3: wrong.stride[between(0, 1)] = between(-2, 0); break;
      case 4: wrong.pad_begin[between(0, 1)] = one_in(2) ? -1 : std::numeric_limits<int64_t>::max(); break;
      default: wrong.h = between(-1, 0);
    }
    return expect(nf_codes_conv2d(some_threads(), &wrong, packed, x.data(), nullptr, nullptr, y.data()), false);
  }
  const char* message = nf_codes_conv2d(some_threads(), &c, packed, x.data(), adds ? residual.data() : nullptr,
                                        looks ? table.data() : nullptr, y.data());
  if (c.batch == 0) return;
  expect(message, right && !(depthwise && adds));
  if (message || c.function == NF_CODES_SILU) return;
  for (int64_t i = 0; i < y.size(); ++i) {
    const int64_t o = i % c.outputs, ox = i / c.outputs % ow, oy = i / c.outputs / ow % oh, b = i / c.outputs / ow / oh;
    int64_t sum = 0;
    for (int64_t ky = 0; ky < c.kh; ++ky)
      for (int64_t kx = 0; kx < c.kw; ++kx)
        for (int64_t j = 0; j < channels; ++j) {
          const int64_t iy = oy * c.stride[0] + ky * c.dilation[0] - c.pad_begin[0];
          const int64_t ix = ox * c.stride[1] + kx * c.dilation[1] - c.pad_begin[1];
          if (iy < 0 || iy >= c.h || ix < 0 || ix >= c.w) continue;
          const int64_t code = x[((b * c.h + iy) * c.w + ix) * c.c + o / outputs * channels + j];
          sum += (code - c.zero) * weights[o * k + (ky * c.kw + kx) * channels + j];
        }
    volatile float v = float(int32_t(sum)) * scale[o];  // each rounded by itself
    v = v + bias[o];
    volatile float more = adds ? float(residual[i]) * c.residual_scale : 0.f;
    if (adds) v = v + more;
    if (c.function) {
      volatile float gate = v * 0.16666667f;
      gate = gate + 0.5f;
      gate = gate < 0.f ? 0.f : gate > 1.f ? 1.f : gate;
      v = v * gate;
      v = v * c.gain;
      v = v + c.offset;
    }
    const uint8_t code = rounded(v, c.low, c.high);
    check(y[i] == (looks ? table[code] : code), "a code differs");
  }
}

void codes_pool() {
  current_call = "nf_codes_max_pool";
  nf_codes_conv c = some_window(true);
  c.c = c.outputs = between(1, 40);
  const bool right = fits(c);
  const int64_t oh = right ? places(c, 0) : 0, ow = right ? places(c, 1) : 0;
  Buffer<uint8_t> x(c.batch * c.h * c.w * c.c), y(c.batch * oh * ow * c.c);
  fill(x);
  const char* message = nf_codes_max_pool(some_threads(), &c, x.data(), y.data());
  if (c.batch) expect(message, right);
}

void codes_others() {
  current_call = "nf_codes_*";
  const int64_t batch = some_size(2), c = between(1, 70), pixels = between(1, one_in(4) ? 300 : 20),
                count = batch * c * pixels;
  Buffer<float> x(count), gate(batch * c), mean(batch * c);
  Buffer<uint8_t> a(count), b(count), y(count);
  fill(x), fill(gate), fill(a), fill(b);
  const int32_t zero = some_code(), top = int32_t(between(zero, 255));
  const nf_threads* t = some_threads();
  switch (between(0, 9)) {
    case 0:
      expect(nf_codes_quantize(t, x.data(), batch, c, pixels, 0.02f, zero, top, y.data()), true);
      for (int64_t i = 0; i < count; ++i) check(y[i] <= top, "a code is out of range");
      break;
    case 1: expect(nf_codes_dequantize(t, a.data(), batch, c, pixels, 0.02f, zero, x.data()), true); break;
    case 2:
      expect(nf_codes_add(t, a.data(), b.data(), count, 0.5f, 0.75f, -3.f, 2, 250, y.data()), true);
      for (int64_t i = 0; i < count; ++i)
        check(y[i] == rounded(float(a[i]) * 0.5f + float(b[i]) * 0.75f - 3.f, 2, 250), "a sum differs");
      break;
    case 3: expect(nf_codes_mean(t, a.data(), batch, c, pixels, 0.02f, zero, mean.data()), true); break;
    case 4:
      expect(nf_codes_gate(t, a.data(), gate.data(), batch, c, pixels, 0.7f, zero, 9.f, 3, 200, y.data()), true);
      for (int64_t i = 0; i < count; ++i) check(y[i] >= 3 && y[i] <= 200, "a code is out of range");
      break;
    case 6: {
      const int64_t groups = between(1, c), each = between(1, c / groups), first = between(0, c - groups * each);
      Buffer<uint8_t> taken(batch * pixels * groups * each);
      expect(nf_codes_take(t, a.data(), batch * pixels, c, first, groups * each, groups, taken.data()), true);
      for (int64_t i = 0; i < batch * pixels * groups * each; ++i) {
        const int64_t p = i / (groups * each), at = i % (groups * each);
        check(taken[i] == a[p * c + first + at % groups * each + at / groups], "a code is not the one that was taken");
      }
      break;
    }
    case 7: {
      const int64_t tall = between(1, 3), wide = between(1, 3), line = wide * pixels * c;
      Buffer<uint8_t> larger(batch * tall * line);
      expect(nf_codes_upsample(t, a.data(), batch, pixels, c, tall, wide, larger.data()), true);
      for (int64_t i = 0; i < batch * tall * line; ++i)
        check(larger[i] == a[(i / line / tall * pixels + i % line / c / wide) * c + i % c], "a pixel is another one");
      break;
    }
    case 8: expect(nf_codes_take(t, a.data(), batch * pixels, c, 1, c, 1, y.data()), false); break;
    case 5: expect(nf_codes_add(t, a.data(), b.data(), count, 1e9f, 1.f, 0.f, 0, 255, y.data()), false); break;
    default: expect(nf_codes_quantize(t, x.data(), batch, c, pixels, 0.f, zero, top, y.data()), false);
  }
}

void norms() {
  const int64_t rows = some_size(9), d = some_size(one_in(5) ? 1000 : 70);
  const int32_t kind = int32_t(one_in(25) ? between(-2, 9) : between(0, 3));
  Buffer<float> x(rows * d), residual(rows * d), gain(d), shift(d), sum(rows * d), y(rows * d);
  for (Buffer<float>* b : {&x, &residual, &gain, &shift}) fill(*b);
  const float *add = one_in(2) ? residual.data() : nullptr, *g = one_in(2) ? gain.data() : nullptr,
              *s = one_in(2) ? shift.data() : nullptr;
  float* const sums[] = {nullptr, sum.data(), x.data(), add ? residual.data() : sum.data()};
  float* out = sums[next() % 4];
  const bool right = kind >= 0 && kind <= 3;
  if (one_in(2)) {
    current_call = "nf_norm";
    const char* message = nf_norm(some_threads(), kind, x.data(), add, rows, d, g, s, 1e-5f, 1.25f, out, y.data());
    if (d > 0 || !right) expect(message, right);
    return;
  }
  current_call = "nf_norm_quantize";
  const int32_t bits = some_bits();
  Buffer<int8_t> q(rows * d);
  Buffer<float> scale(rows);
  const char* message = nf_norm_quantize(some_threads(), kind, x.data(), add, rows, d, g, s, 1e-5f, 1.25f, bits, out,
                                         q.data(), scale.data());
  if (d > 0 || !right) expect(message, right && bits_are_right(bits));
  if (message) return;
  for (int64_t i = 0; i < rows * d; ++i) check(std::abs(q[i]) <= (1 << (bits - 1)) - 1, "a code is out of range");
}

void softmax() {
  current_call = "nf_two_pass_softmax";
  const int64_t rows = some_size(9), d = some_size(one_in(5) ? 1000 : 70);
  Buffer<float> x(rows * d), y(rows * d);
  fill(x);
  const char* message = nf_two_pass_softmax(some_threads(), x.data(), rows, d, y.data());
  if (d > 0) expect(message, true);
  if (message) return;
  for (int64_t i = 0; i < rows * d; ++i) check(!(y[i] < 0 || y[i] > 1.001f), "a probability is out of range");
}

void attention() {
  current_call = "nf_attend";
  nf_attention a{};
  a.batch = some_size(2);
  a.kv_heads = between(1, 3);
  a.heads = a.kv_heads * between(1, 3);
  a.queries = some_size(one_in(4) ? 40 : 6);
  a.keys = some_size(one_in(4) ? 90 : 9);
  a.head_dim = between(1, one_in(3) ? 70 : 20);
  a.scale = value(0);
  a.causal = int32_t(between(0, 1));
  const bool tokens_first = one_in(2);
  const auto lay = [&](int64_t* stride, int64_t heads, int64_t tokens) {
    stride[0] = heads * tokens * a.head_dim;
    stride[1] = tokens_first ? a.head_dim : tokens * a.head_dim;
    stride[2] = tokens_first ? heads * a.head_dim : a.head_dim;
  };
  lay(a.q_stride, a.heads, a.queries);
  lay(a.y_stride, a.heads, a.queries);
  lay(a.k_stride, a.kv_heads, a.keys);
  lay(a.v_stride, a.kv_heads, a.keys);
  const int64_t size[3] = {one_in(2) ? 1 : a.batch, one_in(2) ? 1 : a.heads, one_in(2) ? 1 : a.queries};
  int64_t stride = a.keys;
  for (int axis = 2; axis >= 0; --axis) {
    a.mask_stride[axis] = size[axis] == 1 ? 0 : stride;
    stride *= size[axis];
  }
  Buffer<float> q(a.batch * a.heads * a.queries * a.head_dim), y(q.size()),
      k(a.batch * a.kv_heads * a.keys * a.head_dim), v(k.size()), mask(stride);
  for (Buffer<float>* b : {&q, &k, &v, &mask}) fill(*b);
  bool right = true;
  if (one_in(25)) {
    right = false;
    switch (between(0, 4)) {
      case 0: a.batch = -1; break;
      case 1: a.head_dim = between(-1, 0); break;
      case 2: a.kv_heads = one_in(2) ? 0 : a.heads + 1; break;
      case 3: a.queries = -1; break;
      default: a.keys = -1;
    }
  }
  const char* message =
      nf_attend(some_threads(), &a, q.data(), k.data(), v.data(), one_in(2) ? mask.data() : nullptr, y.data());
  if (right ? a.batch > 0 && a.queries > 0 && a.keys > 0 : a.batch != 0) expect(message, right);
}

void packed_bytes() {
  current_call = "nf_packed_bytes";
  const int32_t groups = int32_t(between(-2, 18));
  std::vector<int32_t> sizes(groups > 0 ? size_t(groups) : 1);
  for (auto& s : sizes)
    s = int32_t(one_in(4) ? between(-2, 3) : one_in(4) ? std::numeric_limits<int32_t>::max() : between(0, 1000));
  const int64_t n = one_in(4) ? std::numeric_limits<int64_t>::max() - between(0, 20) : between(-2, 100);
  check(nf_packed_bytes(n, some_bits(), groups, one_in(20) ? nullptr : sizes.data()) >= -1, "a negative size");
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::vector<std::string> isas;
  std::string names = nf_isa_available();
  for (size_t at; !names.empty(); names.erase(0, at == std::string::npos ? at : at + 1))
    isas.push_back(names.substr(0, at = names.find(' ')));
  void (*const calls[])() = {quantize_rows, quantize_static, products,   products,   products,     mistakes,
                             conv,          codes_conv,      codes_conv, codes_pool, codes_others, norms,
                             norms,         softmax,         attention,  attention,  packed_bytes};
  for (current_case = 0; current_case < cases; ++current_case) {
    state = seed * 0x2545f4914f6cdd1du + current_case;  // a case can be run alone
    const std::string& isa = isas[next() % isas.size()];
    if (const char* message = nf_force_isa(isa.c_str())) fail(message);
    calls[next() % (sizeof calls / sizeof *calls)]();
  }
  std::printf("%llu cases on %s\n", static_cast<unsigned long long>(cases), nf_isa_available());
  return 0;
}
