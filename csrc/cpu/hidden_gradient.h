// The gradient phase of pooling. From s = alpha (dalpha - delta) of branch i and key j, with hidden
// rows h = tanh(k) sigmoid(g):
//   dh_j = sum_i s_ij w_i,  dkey = dh sigmoid(g) (1 - tanh(k)^2),
//   dgate = dh tanh(k) sigmoid(g) (1 - sigmoid(g)),  dscore_weight_i = sum_j s_ij h_j.
#pragma once

#include "hidden.h"

namespace attn_ext {
namespace ATTN_EXT_ISA {

// Keys whose share of dscore_weight is summed in the compute type before it joins a sum in double.
constexpr int64_t kHiddenTile = 16;

// The features [col, col + cols) of one unit, which has all branches, against tiles of its keys.
template <class T>
class HiddenGradient {
 public:
  HiddenGradient(const BackwardCall<T>& call, const GradientItem& item, const Unit& unit,
                 double* dweight, Scratch& scratch)
      : call_(call),
        item_(item),
        unit_(unit),
        sequence_(call.problem->sequences[unit.sequence]),
        steps_(steps_of<T>(item.cols)),
        source_(*call.problem, sequence_, unit.head, item.cols, scratch),
        room_(unit.query_count, item.cols, scratch),
        weights_(panel_of<T>(query_rows(call.problem->query, sequence_, unit.head), 0,
                             unit.query_count, item.col, item.cols, room_.data, room_.copy)),
        hidden_(scratch.take<T>(kHiddenTile * columns())),
        dhidden_(scratch.take<T>(kHiddenTile * columns())),
        dkey_(scratch.take<T>(columns())),
        dgate_(scratch.take<T>(columns())),
        dweight_(scratch.take<T>(unit.query_count * columns())),
        dweight_total_(dweight) {
    pad_row<T>(hidden_, 0, kHiddenTile * columns(), 0);
  }

  void run(int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; j += kHiddenTile) {
      run_tile(first + j, smaller(kHiddenTile, count - j));
    }
    if (call_.streams) {
      finish_streams();
    }
  }

 private:
  int64_t columns() const { return steps_ * kStep<T>; }

  void run_tile(int64_t first, int64_t keys) {
    const T* s = call_.dscores + unit_.scores + first;
    const bool wants_rows = call_.dkey.data != nullptr || call_.dgate.data != nullptr;
    if (wants_rows) {
      outer_products<T>({s, 1, unit_.ld}, keys, weights_, unit_.query_count, steps_,
                        {dhidden_, columns(), false});
    }
    for (int64_t j = 0; j < keys; ++j) {
      T* hidden = hidden_ + j * columns();
      T* dhidden = dhidden_ + j * columns();
      if (wants_rows) {
        source_.drop(first + j, item_.col, item_.cols, dhidden);
      }
      source_.for_each_vector(first + j, item_.col, item_.cols, [&](int64_t c, auto... x) {
        const HiddenParts<T> parts = hidden_parts<T>(x...);
        store<T>(hidden + c, parts.value);
        if (wants_rows) {
          const Vec<T> dh = load<T>(dhidden + c);
          store<T>(dkey_ + c, dh * parts.sigmoid * parts.slope);
          store<T>(dgate_ + c, dh * parts.tanh * parts.sigmoid_slope);
        }
      });
      source_.drop(first + j, item_.col, item_.cols, hidden);
      write(call_.dkey, first + j, dkey_);
      write(call_.dgate, first + j, dgate_);
    }
    if (dweight_total_ != nullptr) {
      add_weights(s, keys);
    }
  }

  void write(const Rows& gradient, int64_t j, const T* row) const {
    if (gradient.data != nullptr) {
      const RowSource target = key_rows(gradient, sequence_, unit_.head);
      const int64_t offset = target.offset(j) + item_.col;
      if (call_.streams) {
        stream_row<T>(gradient.data, target.dtype, offset, item_.cols, row);
      } else {
        write_row<T>(gradient.data, target.dtype, offset, 1, item_.cols, row);
      }
    }
  }

  void add_weights(const T* s, int64_t keys) {
    const int64_t branches = unit_.query_count;
    outer_products<T>({s, unit_.ld, 1}, branches, {hidden_, columns(), kStep<T>}, keys, steps_,
                      {dweight_, columns(), false});
    for (int64_t i = 0; i < branches; ++i) {
      double* total = dweight_total_ + i * call_.problem->dim;
      for (int64_t c = 0; c < item_.cols; ++c) {
        total[c] += static_cast<double>(dweight_[i * columns() + c]);
      }
    }
  }

  const BackwardCall<T>& call_;
  const GradientItem& item_;
  const Unit& unit_;
  const Sequence& sequence_;
  const int64_t steps_;
  const HiddenSource<T> source_;
  const PanelRoom<T> room_;
  const Panel<T> weights_;
  T* const hidden_;   // [kHiddenTile, columns]
  T* const dhidden_;  // the same
  T* const dkey_;     // [columns]
  T* const dgate_;
  T* const dweight_;  // [branches, columns]
  double* const dweight_total_;
};

}  // namespace ATTN_EXT_ISA
}  // namespace attn_ext
