#include "linear/panel.h"

#include <algorithm>
#include <cstring>

namespace nf {

const char* check_weight(const nf_weight* w) {
  if (!w) return "nf_weight: null";
  if (w->n < 1 || w->k < 1 || w->n > INT32_MAX || w->k > INT32_MAX) return "nf_weight: n and k must be 1..2^31 - 1";
  if (w->bits < 2 || w->bits > 8) return "nf_weight: bits must be 2..8";
  if (w->groups < 1 || w->groups > kMaxGroups) return "nf_weight: groups must be 1..16";
  if (!w->sizes || !w->packed || !w->scale) return "nf_weight: sizes, packed or scale is null";
  if (w->multipliers && (w->bits > 4 || w->groups > 1)) return "nf_weight: multipliers are for 2..4 bits and one group";
  if (w->multipliers && w->block != 32 && w->block != 64 && w->block != 128 && w->block != 256)
    return "nf_weight: block must be 32, 64, 128 or 256";
  if (w->groups > 1 && !w->order) return "nf_weight: order is null although there is more than one group";
  int64_t sum = 0;
  for (int32_t g = 0; g < w->groups; ++g) {
    if (w->sizes[g] < 0) return "nf_weight: a size is negative";
    sum += w->sizes[g];
  }
  if (sum != w->k) return "nf_weight: sizes do not add up to k";
  if (w->order) {
    bool outside = false;
    for (int64_t i = 0; i < w->k; ++i) outside |= static_cast<uint32_t>(w->order[i]) >= static_cast<uint32_t>(w->k);
    if (outside) return "nf_weight: order holds a channel outside 0..k - 1";
  }
  return nullptr;
}

Layout::Layout(const nf_weight& w) {
  int shift = 0;
  for (int32_t g = 0; g < w.groups; ++g, ++shift) {
    const int64_t count = ceil_div(w.sizes[g], 4);
    if (count == 0) continue;
    segments[segment_count++] = {quads, quads + count, quads == 0 ? 0 : shift};
    quads += count;
    shift = 0;
  }
  if (shift > 1) segments[segment_count++] = {quads, quads, shift - 1};
  packed_quads = round_up(quads, unit_of(w.bits));
}

void gather_row(const nf_weight& w, const int8_t* from, int8_t* to) {
  const int32_t* order = w.order;
  for (int32_t g = 0; g < w.groups; ++g) {
    const int32_t size = w.sizes[g];
    if (order) {
#pragma GCC unroll 8
      for (int32_t i = 0; i < size; ++i) to[i] = from[order[i]];
      order += size;
    } else {
      std::memcpy(to, from, static_cast<size_t>(size));
    }
    to += size;
    for (int32_t i = size; i % 4 != 0; ++i) *to++ = 0;
  }
}

int32_t correction_of(const LinearKernels& kernels, const Layout& l, int bits, const int8_t* row) {
  uint32_t sum = 0;
  for (int i = 0; i < l.segment_count; ++i) {
    const Segment& s = l.segments[i];
    sum = (sum << s.shift) + static_cast<uint32_t>(kernels.row_sum(row + s.begin * 4, (s.end - s.begin) * 4));
  }
  return static_cast<int32_t>(sum << (bits - 1));
}

Way way_of(const LinearKernels& kernels, const nf_weight& w, int64_t rows) {
  if (!w.multipliers) return Way::stretches;
  if (rows <= kernels.blocks.direct_rows) return Way::direct_blocks;
  return kernels.blocks.multiply ? Way::blocks : Way::folded;
}

void span_starts(const LinearKernels& kernels, int bits, int64_t quads, const int8_t* row, int32_t* starts) {
  for (int64_t q = 0; q < quads; q += kSpan)
    *starts++ = kernels.blocks.start(row + q * 4, std::min<int64_t>(kSpan, quads - q) * 4, 1 << (bits - 1));
}

namespace {

void multiply_blocks(const LinearKernels& kernels, const nf_weight& w, const Layout& l, int64_t panel, const Rows& rows,
                     uint8_t* operands, int32_t* sums) {
  const uint8_t* packed = w.packed + panel * l.packed_quads * 8 * w.bits;
  const int64_t block = w.block / 4;
  const int8_t* multipliers = w.multipliers + panel * ceil_div(w.k, w.block) * kPanel;
  Blocks b{rows.codes, rows.stride,    rows.count,  rows.starts, rows.starts_stride,
           packed,     l.packed_quads, multipliers, l.quads,     block / kSpan,
           w.bits,     true,           sums};
  if (rows.way == Way::direct_blocks) return kernels.blocks.direct(b);
  b.w = operands;
  for (int64_t begin = 0; begin < l.quads; begin += kChunk) {
    b.quads = std::min(kChunk, l.quads - begin);
    b.a = rows.codes + begin * 4;
    b.starts = rows.starts + begin / kSpan;
    b.multipliers = multipliers + begin / block * kPanel;
    b.first = begin == 0;
    kernels.unpack(w.bits, true, packed, l.packed_quads, begin, std::min(kChunk, l.packed_quads - begin), operands);
    kernels.blocks.multiply(b);
  }
}

// A chunk of codes times multipliers: operands as of a weight of 8 bits.
void unpack_folded(const LinearKernels& kernels, const nf_weight& w, const Layout& l, int64_t panel, int64_t begin,
                   int64_t count, uint8_t* operands) {
  const int64_t block = w.block / 4;
  const int8_t* multipliers = w.multipliers + (panel * ceil_div(w.k, w.block) + begin / block) * kPanel;
  kernels.unpack(w.bits, true, w.packed + panel * l.packed_quads * 8 * w.bits, l.packed_quads, begin, count, operands);
  for (int64_t q = 0; q < count; q += block, multipliers += kPanel)
    kernels.fold(multipliers, 1 << (w.bits - 1), kernels.is_unsigned(8) ? 128 : 0, std::min(block, count - q),
                 operands + q * kQuadBytes);
}

}  // namespace

void multiply_panel(const LinearKernels& kernels, const nf_weight& w, const Layout& l, int64_t panel, const Rows& rows,
                    uint8_t* operands, int32_t* sums) {
  if (rows.way == Way::direct_blocks || rows.way == Way::blocks)
    return multiply_blocks(kernels, w, l, panel, rows, operands, sums);
  const bool folded = rows.way == Way::folded;
  const int bits = folded ? 8 : w.bits;
  const uint8_t* packed = w.packed + panel * l.packed_quads * 8 * w.bits;
  if (rows.count <= kernels.direct_rows && !rows.pairs && !folded)
    return kernels.direct(
        {rows.codes, rows.stride, rows.count, packed, l.packed_quads, l.segments, l.segment_count, w.bits, sums});
  const bool is_unsigned = kernels.is_unsigned(bits);
  const bool as_they_lie = w.bits == 8 && is_unsigned;
  const int64_t wide = rows.pairs ? 2 : 1, step = kChunk / wide;
  for (int64_t begin = 0; begin < l.quads; begin += step) {
    const int64_t end = std::min(begin + step, l.quads), unpacked = std::min(begin + step, l.packed_quads) - begin;
    const uint8_t* chunk = as_they_lie ? packed + begin * kQuadBytes : operands;
    if (folded) unpack_folded(kernels, w, l, panel, begin, unpacked, operands);
    else if (rows.pairs) kernels.unpack_pairs(packed, begin, unpacked, operands);
    else if (!as_they_lie) kernels.unpack(w.bits, is_unsigned, packed, l.packed_quads, begin, unpacked, operands);
    for (int i = 0; i < l.segment_count; ++i) {
      const Segment& s = l.segments[i];
      const int64_t from = std::max(begin, s.begin), to = std::min(end, s.end);
      const bool trailing = s.begin == s.end && end == l.quads;  // nothing but a shift
      if (from >= to && !trailing) continue;
      const Stretch stretch{rows.codes + from * 4 * wide,
                            rows.stride,
                            rows.count,
                            chunk + (from - begin) * kQuadBytes * wide,
                            trailing ? 0 : to - from,
                            bits,
                            trailing || from == s.begin ? s.shift : 0,
                            from == 0 && !trailing,
                            sums,
                            to == l.quads ? rows.y : nullptr,
                            rows.y_stride};
      if (rows.pairs) kernels.multiply_pairs(stretch);
      else kernels.multiply(stretch);
    }
  }
}

}  // namespace nf
