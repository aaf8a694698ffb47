// Memory of arrays that is not filled with zeros first, and rows of a file that are
// read into it. Only time depends on it: Python does the same where this is not
// compiled.
//
// On Metal the memory is a shared buffer, which the CPU may write: so does MLX itself,
// where it makes an array of numbers of Python's. UNTESTED on hardware.

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace mx = mlx::core;
namespace nb = nanobind;

namespace mlxtp {
namespace {

using Memory = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
using Rows = nb::ndarray<uint8_t, nb::ndim<2>, nb::device::cpu>;
using Span = std::pair<int64_t, int64_t>;

// As much memory is given its pages at once: it stays in a core's cache, and who wants
// new memory meanwhile has to wait.
constexpr int64_t STEP_BYTES = 1 << 20;

// Makes an array whose bytes are whatever lay there, and a view of them, which keeps
// the array.
std::pair<nb::object, Memory> allocate(const std::vector<mx::ShapeElem>& shape,
                                       mx::Dtype dtype) {
  size_t size = mx::size_of(dtype);
  for (const auto length : shape) {
    size *= size_t(length);
  }
  auto data = mx::allocator::malloc(size);
  auto* memory = static_cast<uint8_t*>(data.buffer().raw_ptr());
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  const auto array = nb::cast(
      mx::array(std::move(data), mx::Shape(shape.begin(), shape.end()), dtype));
  return {array, Memory(memory, {size}, array)};
}

// Has the system give memory its pages ahead of what is written into it, many at once:
// a fault for each of them takes longer than the bytes.
class Pages {
 public:
  explicit Pages(const uint8_t* end) : end_(end) {}

  void give([[maybe_unused]] const uint8_t* begin, [[maybe_unused]] int64_t size) {
#ifdef MADV_POPULATE_WRITE
    if (begin + size <= given_) {
      return;
    }
    static const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
    const auto* const start = std::max(begin, given_);
    given_ = std::min(std::max(begin + size, start + STEP_BYTES), end_);
    const auto aligned = uintptr_t(start) / page * page;
    // Linux before 5.14 does not know it, and refuses.
    madvise(reinterpret_cast<void*>(aligned), uintptr_t(given_) - aligned,
            MADV_POPULATE_WRITE);
#endif
  }

 private:
  [[maybe_unused]] const uint8_t* end_;
  [[maybe_unused]] const uint8_t* given_ = nullptr;
};

// Reads some bytes; whether all came.
bool read(int file, uint8_t* memory, int64_t size, int64_t offset, Pages* pages) {
  while (size > 0) {
    const auto step = std::min(size, STEP_BYTES);
    if (pages != nullptr) {
      pages->give(memory, step);
    }
    const auto count = pread(file, memory, size_t(step), offset);
    if (count <= 0) {
      return false;
    }
    memory += count;
    offset += count;
    size -= count;
  }
  return true;
}

// The first and the last byte of spans, in whatever order they are joined.
Span bounds(const std::vector<Span>& spans) {
  Span result = spans.front();
  for (const auto& [start, stop] : spans) {
    result = {std::min(result.first, start), std::max(result.second, stop)};
  }
  return result;
}

// Fills the rows of memory, each with `spans` of a row of the file, where they lie
// `stride` bytes apart, the first at `offset`: one by one, or several rows at once with
// what lies between if `block` of them fit a core's cache.
//
// Returns how many rows are filled: at the next one the file ends, or cannot be read.
size_t fill(int file, const Rows& rows, int64_t offset, int64_t stride,
            const std::vector<Span>& spans, size_t block) {
  const auto count = rows.shape(0);
  const auto distance = rows.stride(0);
  const auto width = int64_t(rows.shape(1));
  auto* const memory = rows.data();
  const nb::gil_scoped_release release;
  Pages pages(memory + int64_t(count - 1) * distance + width);
  const auto [first, last] = bounds(spans);
  const auto between =
      std::make_unique_for_overwrite<uint8_t[]>(block * size_t(stride));
  size_t row = 0;
  while (row < count) {
    const auto place = offset + int64_t(row) * stride;
    auto* target = memory + int64_t(row) * distance;
    if (block == 0) {
      for (const auto& [start, stop] : spans) {
        if (!read(file, target, stop - start, place + start, &pages)) {
          return row;
        }
        target += stop - start;
      }
      row++;
      continue;
    }
    const auto some = std::min(block, count - row);
    const auto size = int64_t(some - 1) * stride + last - first;
    if (!read(file, between.get(), size, place + first, nullptr)) {
      return row;
    }
    for (size_t number = 0; number < some; number++) {
      auto* to = target + int64_t(number) * distance;
      pages.give(to, width);
      for (const auto& [start, stop] : spans) {
        std::memcpy(to, &between[number * size_t(stride) + size_t(start - first)],
                    size_t(stop - start));
        to += stop - start;
      }
    }
    row += some;
  }
  return count;
}

}  // namespace
}  // namespace mlxtp

NB_MODULE(mlxtp_reading, m) {
  // Whether arrays of MLX are known here: refused if MLX was built with a nanobind
  // that keeps other books.
  m.def("probe", [](const mx::array& x) { return x.size(); });
  m.def("allocate", mlxtp::allocate);
  m.def("fill", mlxtp::fill, nb::arg(), nb::arg().noconvert(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg());
}
