// What is not computed: a node of MLX's graph that waits as long as it would take, and
// leaves the processor to others meanwhile. For benchmarks/prefill.py.

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>
#include <mlx/utils.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

namespace mx = mlx::core;
namespace nb = nanobind;

namespace {

class Wait : public mx::Primitive {
 public:
  Wait(mx::Stream stream, double seconds) : Primitive(stream), seconds_(seconds) {}

  void eval_cpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    mx::array& out = outputs[0];
    const mx::array& first = inputs[0];
    const bool passes = out.shape() == first.shape();
    if (passes) {
      out.copy_shared_buffer(first);
    } else {
      out.set_data(mx::allocator::malloc(out.nbytes()));
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [passes, seconds = seconds_, data = out.data<char>(), nbytes = out.nbytes()] {
          const auto begin = std::chrono::steady_clock::now();
          if (!passes) {
            std::memset(data, 0, nbytes);
          }
          std::this_thread::sleep_until(begin + std::chrono::duration<double>(seconds));
        });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error("waits are made on the CPU");
  }

  const char* name() const override { return "Wait"; }

 private:
  double seconds_;
};

// The first input if it has that shape, else zeros of its type: behind all inputs and
// `seconds`.
mx::array wait(const std::vector<mx::array>& inputs, const std::vector<int>& shape,
               double seconds) {
  return mx::array(mx::Shape(shape.begin(), shape.end()), inputs[0].dtype(),
                   std::make_shared<Wait>(mx::to_stream({}), seconds), inputs);
}

}  // namespace

// Named as what mlxtp compiles: its builder knows no other name.
NB_MODULE(mlxtp_native, m) { m.def("wait", wait); }
