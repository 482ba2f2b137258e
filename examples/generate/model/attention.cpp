// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
// Causal attention for train.py, forward and backward, head dimension 16, float32. Not part of the library: torch's own
// CPU attention writes the T x T weights to memory several times, which at 512 tokens is most of a training step.
//
// q, o [B][Hq][T][16]; k, v [B][Hkv][T][16]; lse [B][Hq][T]. Query head h reads KV head h / (Hq / Hkv).

#include <cmath>
#include <vector>

namespace {

constexpr int dim = 16;
constexpr int rows = 4;         // queries that share one pass over the keys
constexpr float scale = 0.25f;  // 1 / sqrt(dim)
typedef float lane __attribute__((vector_size(32), aligned(4)));

// [T][16] -> [16][stride]
void transpose(float const* x, int tokens, int stride, float* out) {
  for (int t = 0; t < tokens; ++t)
    for (int d = 0; d < dim; ++d) out[d * stride + t] = x[t * dim + d];
}

// out[r][j] = factor * <a[r], b[j]> for j < n rounded up to 8; bt is b transposed
void products(float const* a, float const* bt, int n, int stride, float factor, float* out) {
  for (int j = 0; j < n; j += 8) {
    lane acc[rows] = {};
    for (int d = 0; d < dim; ++d) {
      lane const b = *reinterpret_cast<lane const*>(bt + d * stride + j);
      for (int r = 0; r < rows; ++r) acc[r] += a[r * dim + d] * b;
    }
    for (int r = 0; r < rows; ++r) *reinterpret_cast<lane*>(out + r * stride + j) = acc[r] * factor;
  }
}

int stride_for(int tokens) { return (tokens + 7) / 8 * 8; }

}  // namespace

extern "C" void forward(float const* q, float const* k, float const* v, float* o, float* lse,
                        int batch, int heads, int kv_heads, int tokens) {
  int const stride = stride_for(tokens);
  std::vector<float> kt(dim * stride), s(rows * stride);
  for (int bh = 0; bh < batch * heads; ++bh) {
    int const kv = bh / heads * kv_heads + bh % heads / (heads / kv_heads);
    float const* qh = q + long(bh) * tokens * dim;
    float const* vh = v + long(kv) * tokens * dim;
    float* oh = o + long(bh) * tokens * dim;
    if (bh % (heads / kv_heads) == 0)
      transpose(k + long(kv) * tokens * dim, tokens, stride, kt.data());
    for (int i = 0; i < tokens; i += rows) {
      products(qh + i * dim, kt.data(), i + rows, stride, scale, s.data());
      for (int r = 0; r < rows; ++r) {
        float* row = s.data() + r * stride;
        float top = row[0], sum = 0;
        for (int j = 1; j <= i + r; ++j) top = row[j] > top ? row[j] : top;
        for (int j = 0; j <= i + r; ++j) row[j] = std::exp(row[j] - top);
        for (int j = 0; j <= i + r; ++j) sum += row[j];
        for (int j = i + r + 1; j < i + rows; ++j) row[j] = 0;
        lse[long(bh) * tokens + i + r] = top + std::log(sum);
        float const inverse = 1 / sum;
        for (int j = 0; j <= i + r; ++j) row[j] *= inverse;
      }
      for (int half = 0; half < dim; half += 8) {
        lane acc[rows] = {};
        for (int j = 0; j < i + rows; ++j) {
          lane const value = *reinterpret_cast<lane const*>(vh + j * dim + half);
          for (int r = 0; r < rows; ++r) acc[r] += s[r * stride + j] * value;
        }
        for (int r = 0; r < rows; ++r) *reinterpret_cast<lane*>(oh + (i + r) * dim + half) = acc[r];
      }
    }
  }
}

// dk and dv arrive zeroed; tokens is a multiple of 4
extern "C" void backward(float const* q, float const* k, float const* v, float const* o,
                         float const* lse, float const* grad, float* dq, float* dk, float* dv,
                         int batch, int heads, int kv_heads, int tokens) {
  int const stride = stride_for(tokens);
  std::vector<float> kt(dim * stride), vt(dim * stride), p(rows * stride), ds(rows * stride);
  for (int bh = 0; bh < batch * heads; ++bh) {
    int const kv = bh / heads * kv_heads + bh % heads / (heads / kv_heads);
    long const at = long(bh) * tokens, kv_at = long(kv) * tokens * dim;
    float const* qh = q + at * dim;
    float const* gh = grad + at * dim;
    if (bh % (heads / kv_heads) == 0) {
      transpose(k + kv_at, tokens, stride, kt.data());
      transpose(v + kv_at, tokens, stride, vt.data());
    }
    for (int i = 0; i < tokens; i += rows) {
      products(qh + i * dim, kt.data(), i + rows, stride, scale, p.data());
      products(gh + i * dim, vt.data(), i + rows, stride, 1, ds.data());
      for (int r = 0; r < rows; ++r) {
        float *pr = p.data() + r * stride, *dr = ds.data() + r * stride, delta = 0;
        float const* oi = o + (at + i + r) * dim;
        for (int d = 0; d < dim; ++d) delta += oi[d] * gh[(i + r) * dim + d];
        float const norm = lse[at + i + r];
        for (int j = 0; j <= i + r; ++j) pr[j] = std::exp(pr[j] - norm);
        for (int j = 0; j <= i + r; ++j) dr[j] = pr[j] * (dr[j] - delta) * scale;
        for (int j = i + r + 1; j < i + rows; ++j) pr[j] = dr[j] = 0;
      }
      for (int half = 0; half < dim; half += 8) {  // 15 vector registers
        lane qi[rows], gi[rows], acc[rows] = {};
        for (int r = 0; r < rows; ++r) {
          qi[r] = *reinterpret_cast<lane const*>(qh + (i + r) * dim + half);
          gi[r] = *reinterpret_cast<lane const*>(gh + (i + r) * dim + half);
        }
        for (int j = 0; j < i + rows; ++j) {
          long const to = kv_at + j * dim + half;
          lane const key = *reinterpret_cast<lane const*>(k + to);
          lane a = *reinterpret_cast<lane const*>(dk + to),
               b = *reinterpret_cast<lane const*>(dv + to);
          for (int r = 0; r < rows; ++r) {
            acc[r] += ds[r * stride + j] * key;
            a += ds[r * stride + j] * qi[r];
            b += p[r * stride + j] * gi[r];
          }
          *reinterpret_cast<lane*>(dk + to) = a;
          *reinterpret_cast<lane*>(dv + to) = b;
        }
        for (int r = 0; r < rows; ++r)
          *reinterpret_cast<lane*>(dq + (at + i + r) * dim + half) = acc[r];
      }
    }
  }
}
