// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/cache.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace kvkeep::generate {

kv_cache::kv_cache(cache_shape const& shape, index_t n_layers, layout_options const& o)
    : shape_(shape), n_layers_(n_layers) {
  if (o.kind == layout_kind::paged) {
    make_pages(o.block_size);
    return;
  }
  std::size_t const floats =
      product(n_layers, shape.n_seq, shape.n_kv_heads, shape.max_slots, shape.dim_k);
  k_.resize(floats);
  v_.resize(floats);
  if (o.kind == layout_kind::ragged) {
    make_ranges();
    return;
  }
  if (o.kind != layout_kind::strided)
    throw std::invalid_argument("layout: strided, paged or ragged");
  offset_t const layer = static_cast<offset_t>(floats) / n_layers;
  for (index_t l = 0; l < n_layers; ++l)
    views_.push_back(contiguous_view(k_.data() + l * layer, v_.data() + l * layer, shape));
}

/// All layers draw from one pool, so a layer with a small budget leaves blocks to the others.
void kv_cache::make_pages(index_t block_size) {
  if (block_size < 1) throw std::invalid_argument("block: at least 1 slot");
  block_size_ = block_size;
  index_t const per_table = (shape_.max_slots + block_size - 1) / block_size;
  std::size_t const tables = product(n_layers_, shape_.n_seq);
  auto const n_blocks = static_cast<index_t>(tables * static_cast<std::size_t>(per_table));
  std::size_t const floats = product(n_blocks, block_size, shape_.n_kv_heads, shape_.dim_k);
  k_.resize(floats);
  v_.resize(floats);
  table_.assign(tables * static_cast<std::size_t>(per_table), -1);
  held_.resize(tables);
  free_.resize(static_cast<std::size_t>(n_blocks));
  std::iota(free_.rbegin(), free_.rend(), 0);
  for (index_t l = 0; l < n_layers_; ++l)
    views_.push_back(paged_view(
        k_.data(), v_.data(), shape_,
        {block_size, n_blocks, table_.data() + offset_t{l} * shape_.n_seq * per_table, per_table}));
}

void kv_cache::make_ranges() {
  offset_t const range = offset_t{shape_.max_slots} * shape_.dim_k;
  std::size_t const per_layer = product(shape_.n_seq, shape_.n_kv_heads);
  slots_.assign(per_layer, shape_.max_slots);
  for (std::size_t i = 0; i < per_layer * static_cast<std::size_t>(n_layers_); ++i)
    base_.push_back(static_cast<offset_t>(i) * range);
  for (index_t l = 0; l < n_layers_; ++l) {
    offset_t const* const base = base_.data() + static_cast<std::size_t>(l) * per_layer;
    views_.push_back(ragged_view(k_.data(), v_.data(), shape_, base, base, slots_.data()));
  }
}

void kv_cache::resize(index_t layer, index_t seq, index_t slots) {
  if (block_size_ == 0) return;
  auto& blocks = held(layer, seq);
  auto const wanted = static_cast<std::size_t>((slots + block_size_ - 1) / block_size_);
  auto const& pages = view(layer).k.layout.paged;
  if (wanted > static_cast<std::size_t>(pages.blocks_per_table))
    throw std::runtime_error("a sequence needs more slots than its block table holds");
  index_t* const table =
      table_.data() + (offset_t{layer} * shape_.n_seq + seq) * pages.blocks_per_table;
  while (blocks.size() > wanted) {
    free_.push_back(blocks.back());
    blocks.pop_back();
    table[blocks.size()] = -1;
  }
  while (blocks.size() < wanted) {
    table[blocks.size()] = free_.back();
    blocks.push_back(free_.back());
    free_.pop_back();
  }
  peak_blocks_ = std::max(peak_blocks_, static_cast<std::size_t>(pages.n_blocks) - free_.size());
}

std::size_t kv_cache::block_bytes() const {
  return product(block_size_, shape_.n_kv_heads, shape_.dim_k + shape_.dim_v) * sizeof(float);
}

float* kv_cache::at(plane_ref<> const& plane, place const& p) {
  offset_t const offset =
      visit_layout(plane.layout, [&](auto const& l) { return l.offset(p.seq, p.head, p.slot); });
  return reinterpret_cast<float*>(plane.data) + offset;
}

}  // namespace kvkeep::generate
