// Collectives as nodes of MLX's graph, and the module that Python imports.
//
// Every node has a second output, a token without bytes, which is an input of the next
// node. So the collectives of a process are made in the order in which they were
// called, whatever order MLX would choose, and all that were called are made. Where
// computations take turns, each has a chain of its own (`Core::follow`), and the order
// is that in which they are begun.

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>
#include <mlx/scheduler.h>
#include <mlx/stream.h>
#include <mlx/transforms.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

#include "collectives.h"

namespace mx = mlx::core;
namespace nb = nanobind;

namespace mlxtp {
namespace {

// What is done with the memory of the input and the output.
using Work = std::function<void(Collectives&, const char* x, char* out)>;

Element element_of(mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::bool_:
      return Element::boolean;
    case mx::Dtype::Val::int8:
    case mx::Dtype::Val::uint8:
      return Element::uint8;
    case mx::Dtype::Val::int16:
    case mx::Dtype::Val::uint16:
      return Element::uint16;
    case mx::Dtype::Val::int32:
    case mx::Dtype::Val::uint32:
      return Element::uint32;
    case mx::Dtype::Val::int64:
    case mx::Dtype::Val::uint64:
      return Element::uint64;
    case mx::Dtype::Val::float16:
      return Element::f16;
    case mx::Dtype::Val::bfloat16:
      return Element::bf16;
    case mx::Dtype::Val::float32:
      return Element::f32;
    case mx::Dtype::Val::float64:
      return Element::f64;
    case mx::Dtype::Val::complex64:
      break;
  }
  throw std::invalid_argument("no allreduce of complex64");
}

Shape shape_of(const std::string& algorithm) {
  return algorithm.starts_with("ring") ? Shape::ring : Shape::direct;
}

Algorithm algorithm_of(const std::string& name) {
  return {shape_of(name), name.ends_with("two-shot") ? Shots::two : Shots::one};
}

// Copies an array with gaps, a dimension after the other; returns the end of `out`.
char* pack(const char* x, const mx::Shape& shape, const mx::Strides& strides,
           size_t itemsize, size_t axis, char* out) {
  if (axis == shape.size()) {
    std::memcpy(out, x, itemsize);
    return out + itemsize;
  }
  for (int i = 0; i < shape[axis]; ++i) {
    const char* inner = x + i * strides[axis] * int64_t(itemsize);
    out = pack(inner, shape, strides, itemsize, axis + 1, out);
  }
  return out;
}

// Memory that is never given back.
auto& abandoned() {
  using Memory =
      std::pair<std::shared_ptr<mx::array::Data>, std::shared_ptr<std::vector<char>>>;
  static thread_local auto* all = new std::vector<Memory>();
  return *all;
}

class Node : public mx::Primitive {
 public:
  // `source` is the stream of the CPU that computes the input, if one does.
  Node(mx::Stream stream, std::optional<mx::Stream> source,
       std::shared_ptr<Collectives> collectives, std::shared_ptr<const Call> call,
       Work work)
      : Primitive(stream),
        source_(source),
        collectives_(std::move(collectives)),
        call_(std::move(call)),
        work_(std::move(work)) {}

  void eval_cpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    const mx::array& x = inputs[0];
    for (mx::array& output : outputs) {
      output.set_data(mx::allocator::malloc(output.nbytes()));
    }
    // Where memory lies is asked in the task: before, a GPU may still move it.
    auto task = [collectives = collectives_, call = call_, work = work_,
                 source = source_.value_or(stream()), data = x.data_shared_ptr(),
                 offset = x.offset(), gaps = !x.flags().row_contiguous,
                 shape = x.shape(), strides = x.strides(), itemsize = x.itemsize(),
                 nbytes = x.nbytes(), buffer = outputs[0].buffer()]() mutable {
      try {  // what could not be computed is not sent
        mx::scheduler::check_error(source);
      } catch (const std::exception& error) {
        collectives->fail(*call, error.what());
      }
      const char* from = static_cast<const char*>(data->buffer().raw_ptr()) + offset;
      const auto packed = std::make_shared<std::vector<char>>(gaps ? nbytes : 0);
      if (gaps) {
        pack(from, shape, strides, itemsize, 0, packed->data());
        from = packed->data();
      }
      try {
        work(*collectives, from, static_cast<char*>(buffer.raw_ptr()));
      } catch (...) {
        // MPI may still read either, and nothing says when it has done so.
        abandoned().emplace_back(data, packed);
        throw;
      }
    };
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error("collectives are made on a stream of the CPU");
  }

  const char* name() const override { return call_->name.c_str(); }

 private:
  std::optional<mx::Stream> source_;
  std::shared_ptr<Collectives> collectives_;
  std::shared_ptr<const Call> call_;
  Work work_;
};

// The collective that was called last in this process, over whatever communicator.
struct Last {
  std::optional<mx::array> token;
  std::thread::id caller;

  // What it needs may be computed on streams of the thread that called it, so no other
  // thread can evaluate it.
  bool is_of_this_thread() const { return caller == std::this_thread::get_id(); }
};

bool is_waiting(const mx::array& token) {
  return token.status() == mx::array::Status::unscheduled;
}

Last& last() {
  static auto* const last = new Last();
  return *last;
}

// Why collectives were stopped, and the function of Python that raises the error.
struct Stopped {
  std::string words;
  nb::object raise;
};

Stopped& stopped() {
  static auto* const stopped = new Stopped();
  return *stopped;
}

// Raises that error where MLX throws what a collective that was stopped has thrown.
void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const std::exception& error) {
    if (!stopped().raise.is_valid() || stopped().words != error.what()) {
      throw;
    }
    try {
      stopped().raise();
    } catch (nb::python_error& raised) {
      raised.restore();
    }
  }
}

// The collectives of one communicator.
class Core {
 public:
  Core(uintptr_t comm, bool crowded)
      : collectives_(std::make_shared<Collectives>(
            *reinterpret_cast<const MPI_Comm*>(comm), crowded)),
        stream_(mx::new_thread_unsafe_stream(mx::Device::cpu)) {}

  mx::array allreduce(const mx::array& x, const std::string& algorithm, uint64_t number,
                      const std::string& name, const std::string& layer) {
    const auto call = std::make_shared<const Call>(name, layer, number, apart_);
    return put(x, x.shape(), call,
               [call, count = x.size(), element = element_of(x.dtype()),
                algorithm = algorithm_of(algorithm)](Collectives& collectives,
                                                     const char* from, char* out) {
                 collectives.allreduce(call, from, out, count, element, algorithm);
               });
  }

  mx::array allgather(const mx::array& x, const std::vector<size_t>& sizes,
                      const std::string& algorithm, uint64_t number,
                      const std::string& layer) {
    mx::Shape shape = x.shape();
    shape.back() = int(std::accumulate(sizes.begin(), sizes.end(), size_t{0}));
    const size_t rows =
        std::accumulate(shape.begin(), shape.end() - 1, size_t{1}, std::multiplies<>());
    std::vector<size_t> widths = sizes;
    for (size_t& width : widths) {
      width *= x.itemsize();
    }
    return gather(x, shape, rows, widths, algorithm,
                  {"allgather", layer, number, apart_});
  }

  mx::array bcast(const mx::array& x, int root, const std::string& algorithm,
                  uint64_t number, const std::string& layer) {
    // A gather in which all parts but one are empty.
    std::vector<size_t> widths(collectives_->size(), 0);
    widths[root] = x.nbytes();
    return gather(x, x.shape(), 1, widths, algorithm, {"bcast", layer, number, apart_});
  }

  // Outside of the graph, of the memory of `x`; the sum is lost. To be timed.
  void time_allreduce(const nb::ndarray<const float, nb::ndim<1>, nb::c_contig>& x,
                      const std::string& algorithm, uint64_t number) {
    const auto call = std::make_shared<const Call>("allreduce", "", number);
    std::vector<float> sum(x.size());
    const nb::gil_scoped_release release;
    collectives_->allreduce(call, x.data(), sum.data(), x.size(), Element::f32,
                            algorithm_of(algorithm));
  }

  std::tuple<uint64_t, std::string, std::string, double, std::string> state() const {
    const State state = collectives_->state();
    return {state.begun, state.name, state.layer, state.seconds, state.failure};
  }

  double seconds() const { return collectives_->seconds(); }
  // Lets every collective fail, those that are under way too; MLX then calls `raise`.
  void stop(const std::string& words, nb::object raise) {
    stopped() = {words, std::move(raise)};
    collectives_->stop(words);
  }

  void forget() {
    const nb::gil_scoped_release release;
    collectives_->forget();
  }

  // Begins to make what was called, whether or not anybody reads it.
  static void flush() {
    const std::optional<mx::array> token = last().token;
    if (token && is_waiting(*token) && last().is_of_this_thread()) {
      const nb::gil_scoped_release release;
      mx::async_eval({*token});
    }
  }

  // The token of the collective that was called last, if any was.
  static std::optional<mx::array> token() {
    check_thread("collectives by turns");
    return last().token;
  }

  // What is called from now on waits for `token`, instead of the last call. With
  // `apart` it is made on the stream of its own, beside what the CPU computes.
  void follow(const std::optional<mx::array>& token, bool apart) {
    last() = {token, std::this_thread::get_id()};
    apart_ = apart;
  }

  // Makes what was called, and parts from the other ranks, as all of them do.
  void close() {
    std::optional<mx::array> token;
    if (last().is_of_this_thread() && !collectives_->stopped()) {
      token = last().token;
    }
    const nb::gil_scoped_release release;
    if (token) {
      mx::eval({*token});
    }
    if (!collectives_->stopped()) {
      mx::synchronize(stream_);
    }
    collectives_->close();
  }

 private:
  mx::array gather(const mx::array& x, const mx::Shape& shape, size_t rows,
                   const std::vector<size_t>& widths, const std::string& algorithm,
                   const Call& named) {
    const auto call = std::make_shared<const Call>(named);
    return put(x, shape, call,
               [call, rows, widths, kind = shape_of(algorithm)](
                   Collectives& collectives, const char* from, char* out) {
                 collectives.allgather(call, from, out, rows, widths, kind);
               });
  }

  mx::array put(const mx::array& x, const mx::Shape& shape,
                const std::shared_ptr<const Call>& call, Work work) {
    mx::array probe(0.0F);
    probe.set_tracer(true);  // which counts inside of a transformation alone
    if (probe.is_tracer()) {
      throw std::invalid_argument(
          call->name + (call->layer.empty() ? "" : " of " + call->layer) +
          ": a collective cannot stand inside mx.compile, mx.vmap or mx.grad");
    }
    std::vector<mx::array> inputs = {x};
    if (const auto token = last().token; token) {
      check_thread(call->name);
      inputs.push_back(*token);
    }
    const auto source = cpu_stream_of(x);
    // On the stream of the CPU that computes the input no thread has to wake another.
    const mx::Stream stream = apart_ ? stream_ : source.value_or(stream_);
    auto outputs = mx::array::make_arrays(
        {shape, {0}}, {x.dtype(), mx::uint8},
        std::make_shared<Node>(stream, source, collectives_, call, std::move(work)),
        inputs);
    last() = {outputs[1], std::this_thread::get_id()};
    return outputs[0];
  }

  // Throws where the collective that was called last has to be evaluated elsewhere.
  static void check_thread(const std::string& name) {
    const std::optional<mx::array>& token = last().token;
    if (token && is_waiting(*token) && !last().is_of_this_thread()) {
      throw std::runtime_error(
          name +
          ": another thread has called collectives that are not evaluated; it has to "
          "evaluate them (mx.eval) before this one calls any");
    }
  }

  static std::optional<mx::Stream> cpu_stream_of(const mx::array& x) {
    const bool is_on_cpu = x.status() == mx::array::Status::unscheduled &&
                           x.has_primitive() &&
                           x.primitive().stream().device == mx::Device::cpu;
    return is_on_cpu ? std::optional(x.primitive().stream()) : std::nullopt;
  }

  std::shared_ptr<Collectives> collectives_;
  mx::Stream stream_;
  bool apart_ = false;
};

std::string library_version() {
  char words[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(words, &length);
  return {words, size_t(length)};
}

}  // namespace
}  // namespace mlxtp

NB_MODULE(mlxtp_native, m) {
  using mlxtp::Core;
  m.def("library_version", mlxtp::library_version);
  // Whether arrays of MLX are known here: refused if MLX was built with a nanobind
  // that keeps other books.
  m.def("probe", [](const mx::array& x) { return x.size(); });
  nb::register_exception_translator(mlxtp::translate);
  nb::class_<Core>(m, "Core")
      .def(nb::init<uintptr_t, bool>(), nb::call_guard<nb::gil_scoped_release>())
      .def("allreduce", &Core::allreduce)
      .def("allgather", &Core::allgather)
      .def("bcast", &Core::bcast)
      .def("time_allreduce", &Core::time_allreduce)
      .def("state", &Core::state)
      .def("seconds", &Core::seconds)
      .def("stop", &Core::stop)
      .def("forget", &Core::forget)
      .def_static("flush", &Core::flush)
      .def_static("token", &Core::token)
      .def("follow", &Core::follow, nb::arg("token").none(), nb::arg("apart"))
      .def("close", &Core::close);
}
