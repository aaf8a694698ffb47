// Memory of arrays that is not filled with zeros first, and rows of a file that are
// read into it. Only time depends on it: Python does the same where this is not
// compiled.
//
// On Metal the memory is a shared buffer, which the CPU may write: so does MLX itself,
// where it makes an array of numbers of Python's. UNTESTED on hardware.

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/device.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
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

// Smaller arrays have no page of 2 MiB.
[[maybe_unused]] constexpr size_t LARGE_BYTES = 4UL << 20U;

// Lets Linux take pages of 2 MiB: a fault for each of 4 KiB takes as long as the copy.
void advise([[maybe_unused]] void* memory, [[maybe_unused]] size_t size) {
#ifdef __linux__
  if (size < LARGE_BYTES || mx::is_available(mx::Device::gpu)) {
    return;  // a GPU's memory is its driver's
  }
  // Begun pages are advised as a whole: so neighbours stay one mapping of the system's,
  // of which it has a limited number.
  const auto page = size_t(sysconf(_SC_PAGESIZE));
  const auto begin = uintptr_t(memory) / page * page;
  const auto end = uintptr_t(memory) + size;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

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
  advise(memory, size);
  auto array = nb::cast(
      mx::array(std::move(data), mx::Shape(shape.begin(), shape.end()), dtype));
  return {array, Memory(memory, {size}, array)};
}

// Reads some bytes; whether all came.
bool read(int file, uint8_t* memory, int64_t size, int64_t offset) {
  while (size > 0) {
    const auto count = pread(file, memory, size_t(size), offset);
    if (count <= 0) {
      return false;
    }
    memory += count;
    offset += count;
    size -= count;
  }
  return true;
}

// Fills the rows of memory, each with `spans` of a row of the file, where they lie
// `stride` bytes apart, the first at `offset`.
//
// Returns how many rows are filled: at the next one the file ends, or cannot be read.
size_t fill(int file, const Rows& rows, int64_t offset, int64_t stride,
            const std::vector<Span>& spans) {
  auto* const memory = rows.data();
  const auto count = rows.shape(0);
  const auto distance = rows.stride(0);
  const nb::gil_scoped_release release;
  for (size_t row = 0; row < count; row++) {
    auto* target = memory + int64_t(row) * distance;
    for (const auto& [start, stop] : spans) {
      const auto place = offset + int64_t(row) * stride + start;
      if (!read(file, target, stop - start, place)) {
        return row;
      }
      target += stop - start;
    }
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
        nb::arg());
}
