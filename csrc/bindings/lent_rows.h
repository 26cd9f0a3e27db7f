// Memory of ours as torch's tensors, by way of DLPack; and the rows that a call is lent, all tensors of them at once: for each of
// five tensors an object and a call of Python's would cost a dispatch more than its launch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/device.h"
#include "bindings/tensor_check.h"
#include "core/dlpack.h"
#include "core/error.h"
#include "runtime/high_throughput.h"

namespace deep_ep::bindings {

namespace py = pybind11;
using runtime::LentMemory;

// What a capsule needs of torch. Never destroyed.
struct TorchFunctions {
    py::object current_stream;  // (index): the one of the calling thread on a GPU
    py::object from_capsule;    // (capsule): the tensor

    static TorchFunctions& get() {
        static auto* functions = new TorchFunctions;
        return *functions;
    }
};

// A capsule for torch.from_dlpack: row-major memory at `address`. `on_drop` runs when no tensor is over it any more.
inline py::capsule make_capsule(void* address, std::vector<int64_t> shape, dlpack::DataType dtype, int cuda_index,
                                std::function<void()> on_drop) {
    const dlpack::Device device =
        cuda_index < 0 ? dlpack::Device{dlpack::kCpu, 0} : dlpack::Device{dlpack::kCuda, cuda_index};
    auto* tensor = dlpack::make_tensor(address, device, dtype, std::move(shape), std::move(on_drop));
    // A consumer renames the capsule and calls the deleter itself.
    return py::capsule(tensor, "dltensor", [](PyObject* capsule) {
        if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
        auto* unused = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
        unused->deleter(unused);
    });
}

// Of bytes, whose owner outlives all tensors over them.
inline py::capsule make_tensor(uintptr_t address, int64_t num_bytes, int cuda_index) {
    return make_capsule(pointer<void>(address), {num_bytes}, dlpack::kBytes, cuda_index, [] {});
}

// What a row is in each of several tensors, of which there may be fewer.
class RowForm {
public:
    static constexpr size_t kMaxDims = 3;  // of a row

    struct Part {
        std::vector<int64_t> shape;  // of a row
        dlpack::DataType dtype;
        py::object view;  // torch's dtype where DLPack has no name for it: made as bytes, then viewed; or None
        int64_t row_bytes;
    };

    // Of each tensor its row's shape, what DLPack calls its type (code and bits) and its `view`; None: there is none.
    explicit RowForm(const py::iterable& parts) {
        for (const py::handle given : parts) {
            if (given.is_none()) {
                parts_.push_back(nullptr);
                continue;
            }
            auto [shape, code, bits, view] = given.cast<std::tuple<std::vector<int64_t>, int, int, py::object>>();
            EP_ENSURE(shape.size() <= kMaxDims, "a row can have at most ", kMaxDims, " dimensions");
            int64_t row_bytes = bits / 8;
            for (const int64_t extent : shape) row_bytes *= extent;
            parts_.push_back(std::make_unique<Part>(Part{std::move(shape),
                                                         {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1},
                                                         std::move(view),
                                                         row_bytes}));
        }
    }

    const std::vector<std::unique_ptr<Part>>& parts() const { return parts_; }

private:
    std::vector<std::unique_ptr<Part>> parts_;  // null: there is no such tensor
};

// Memory for so many rows, until tensors are over it. Dropping this gives it back.
class LentRows {
public:
    LentRows(std::shared_ptr<const RowForm> form, int64_t num_rows, std::vector<std::unique_ptr<LentMemory>> pieces)
        : num_rows(num_rows), form_(std::move(form)), pieces_(std::move(pieces)) {}

    const int64_t num_rows;

    // Of the tensors; 0: there is none.
    py::tuple addresses() const {
        py::tuple found(form_->parts().size());
        size_t next = 0;
        for (size_t i = 0; i < found.size(); ++i)
            found[i] = form_->parts()[i] == nullptr ? 0 : reinterpret_cast<uintptr_t>(pieces_[next++]->address());
        return found;
    }

    // Over the first rows, once: the memory of the others, which nobody has used, is free at once; the rest of a piece when the
    // last tensor over it goes, on whichever thread. None: there is no such tensor.
    py::tuple tensors(int64_t num_rows, int cuda_index) {
        auto pieces = std::exchange(pieces_, {});
        py::tuple made(form_->parts().size());
        size_t next = 0;
        for (size_t i = 0; i < made.size(); ++i) {
            const RowForm::Part* part = form_->parts()[i].get();
            if (part == nullptr)
                made[i] = py::none();
            else
                made[i] = make_tensor(*part, std::move(pieces.at(next++)), num_rows, cuda_index);
        }
        return made;
    }

private:
    static py::object make_tensor(const RowForm::Part& part, std::unique_ptr<LentMemory> memory, int64_t num_rows,
                                  int cuda_index) {
        memory->shrink(static_cast<uint64_t>(num_rows * part.row_bytes));
        py::object made = exchange_api() == nullptr ? by_capsule(part, std::move(memory), num_rows, cuda_index)
                                                    : by_exchange(part, std::move(memory), num_rows, cuda_index);
        return part.view.is_none() ? made : made.attr("view")(part.view);
    }

    static py::object by_capsule(const RowForm::Part& part, std::shared_ptr<LentMemory> memory, int64_t num_rows,
                                 int cuda_index) {
        std::vector<int64_t> shape;
        shape.reserve(part.shape.size() + 1);
        shape.push_back(num_rows);
        shape.insert(shape.end(), part.shape.begin(), part.shape.end());
        auto on_drop = [memory, cuda_index] {
            if (cuda_index < 0 || Py_IsInitialized() == 0) return;  // its destructor does what can be done
            const py::gil_scoped_acquire acquired;
            memory->give_back(pointer<void>(TorchFunctions::get().current_stream(cuda_index).cast<uintptr_t>()));
        };
        return TorchFunctions::get().from_capsule(
            make_capsule(memory->address(), std::move(shape), part.dtype, cuda_index, std::move(on_drop)));
    }

    // What torch holds as long as a tensor is over the memory; without a call of Python's, then or now.
    struct Loan {
        dlpack::VersionedTensor managed;
        std::array<int64_t, RowForm::kMaxDims + 1> shape, strides;
        std::unique_ptr<LentMemory> memory;

        static void end(dlpack::VersionedTensor* managed) {
            const std::unique_ptr<Loan> loan(static_cast<Loan*>(managed->context));
            const dlpack::Device& device = managed->tensor.device;
            void* stream = nullptr;
            if (device.type != dlpack::kCuda || Py_IsInitialized() == 0) return;
            if (exchange_api()->current_stream(device.type, device.id, &stream) == 0) loan->memory->give_back(stream);
        }
    };

    static py::object by_exchange(const RowForm::Part& part, std::unique_ptr<LentMemory> memory, int64_t num_rows,
                                  int cuda_index) {
        auto loan = std::make_unique<Loan>();
        const size_t num_dims = part.shape.size() + 1;
        loan->shape[0] = num_rows;
        std::copy(part.shape.begin(), part.shape.end(), loan->shape.begin() + 1);
        loan->strides[num_dims - 1] = 1;
        for (size_t i = num_dims; i-- > 1;) loan->strides[i - 1] = loan->strides[i] * loan->shape[i];
        const dlpack::Device device =
            cuda_index < 0 ? dlpack::Device{dlpack::kCpu, 0} : dlpack::Device{dlpack::kCuda, cuda_index};
        loan->managed = {.version = exchange_api()->version,
                         .context = loan.get(),
                         .deleter = &Loan::end,
                         .flags = 0,
                         .tensor = {memory->address(), device, static_cast<int32_t>(num_dims), part.dtype,
                                    loan->shape.data(), loan->strides.data(), 0}};
        loan->memory = std::move(memory);
        void* made = nullptr;
        if (exchange_api()->to_object(&loan->managed, &made) != 0) throw py::error_already_set();
        static_cast<void>(loan.release());  // torch's, which ends it
        return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
    }

    std::shared_ptr<const RowForm> form_;
    std::vector<std::unique_ptr<LentMemory>> pieces_;
};

// Null: there is no room for all.
inline std::unique_ptr<LentRows> lend(runtime::Loans& loans, std::shared_ptr<const RowForm> form, int64_t num_rows,
                                      dev::Stream stream, bool is_captured) {
    std::vector<int64_t> sizes;
    sizes.reserve(form->parts().size());
    for (const auto& part : form->parts())
        if (part != nullptr) sizes.push_back(num_rows * part->row_bytes);
    // For a graph it waits for earlier uses.
    const auto released = is_captured ? std::make_unique<py::gil_scoped_release>() : nullptr;
    auto pieces = loans.lend(sizes, stream, is_captured);
    if (pieces.empty()) return nullptr;
    return std::make_unique<LentRows>(std::move(form), num_rows, std::move(pieces));
}

inline void bind_lent_rows(py::module_& m) {
    py::class_<RowForm, std::shared_ptr<RowForm>>(m, "RowForm").def(py::init<const py::iterable&>(), py::arg("parts"));
    py::class_<LentRows>(m, "LentRows")
        .def_readonly("num_rows", &LentRows::num_rows)
        .def("addresses", &LentRows::addresses)
        .def("tensors", &LentRows::tensors, py::arg("num_rows"), py::arg("cuda_index"));
    m.def("make_tensor", &make_tensor, py::arg("address"), py::arg("num_bytes"), py::arg("cuda_index"));
    m.def(
        "use_torch",
        [](py::object current_stream, py::object from_capsule) {
            TorchFunctions::get() = {std::move(current_stream), std::move(from_capsule)};
        },
        py::arg("current_stream"), py::arg("from_capsule"));
}

}  // namespace deep_ep::bindings
