// The stream of a synchronous call that Python need not order: the one that is current in torch, where the call before ran too, or
// the only one of the CPU.
#pragma once

#include <pybind11/pybind11.h>
#include <structmember.h>

#include <memory>
#include <optional>

#include "bindings/device.h"
#include "bindings/torch_tensor.h"

namespace deep_ep::bindings {

namespace py = pybind11;

// What CudaStreams of _streams.py knows of the operation before; in a type of its own, whose attributes are as quick as slots.
struct StreamOrder {
    PyObject_HEAD PyObject* last_stream;  // an int, or None
    PyObject* last_event;
    char is_marked;
    char is_shared;

    bool is_last(dev::Stream stream) const {
        return last_stream != nullptr && PyLong_Check(last_stream) != 0 &&
               PyLong_AsVoidPtr(last_stream) == static_cast<void*>(stream);
    }
};

struct Phase {
    dev::Stream stream;
    bool leaves_event;  // behind it: there are several streams
};

class CallerStream {
public:
    // Of the Streams of a Buffer.
    explicit CallerStream(py::object streams) : streams_(std::move(streams)) {
        if (streams_.attr("kind").cast<std::string>() != "cuda") {
            comm_ = pointer<void>(streams_.attr("comm_stream").cast<uintptr_t>());
            return;
        }
        device_ = {dlpack::kCuda, streams_.attr("index").cast<int32_t>()};
        native_ = streams_.attr("native").cast<std::shared_ptr<dev::Device>>();
        own_event_ = streams_.attr("own_event");
        event_ = pointer<void>(own_event_.attr("cuda_event").cast<uintptr_t>());
        order_owner_ = streams_.attr("order");
        order_ = reinterpret_cast<StreamOrder*>(order_owner_.ptr());
    }

    const dlpack::Device& device() const { return device_; }
    bool is_cuda() const { return device_.type == dlpack::kCuda; }

    // None: Python has something to wait for, or to ask.
    std::optional<dev::Stream> open() const {
        const auto stream = current();
        const bool is_plain =
            stream.has_value() && (!is_cuda() || native_->stream_kind(*stream) == dev::StreamKind::kPlain);
        return is_plain ? stream : std::nullopt;
    }
    // The same for a phase of a low-latency call, in a capture or not; see CudaStreams.enter_phase.
    std::optional<Phase> open_phase() const {
        const auto stream = current();
        return stream.has_value() ? open_phase(*stream) : std::nullopt;
    }
    std::optional<Phase> open_phase(dev::Stream stream) const {
        if (!is_cuda()) return Phase{stream, false};
        const bool is_shared = order_->is_shared != 0;
        if (!order_->is_last(stream) || (is_shared && is_captured(stream))) return std::nullopt;
        return Phase{stream, is_shared};
    }
    bool is_captured(dev::Stream stream) const {
        return is_cuda() && stream != nullptr && native_->stream_kind(stream) == dev::StreamKind::kCaptured;
    }

    // What was launched is the operation before, from now on.
    void close(dev::Stream stream) const {
        if (is_cuda())
            mark(stream);
        else
            streams_.attr("finish")();  // throws what a kernel has reported
    }
    void begin_phase() const {
        if (is_cuda()) order_->is_marked = 0;
    }
    void close_phase(const Phase& phase) const {
        if (!is_cuda())
            streams_.attr("finish")();
        else if (phase.leaves_event)
            mark(phase.stream);
    }

    // Runs `call`, which launches on `stream` and closes the call. Where it throws, kernels may have been launched: those of the CPU
    // use what `tensors()` returns as long as they run; on a GPU the stream's order is enough.
    template <class Run, class Tensors>
    void run(dev::Stream stream, bool leaves_event, const Run& call, const Tensors& tensors) const {
        try {
            call();
        } catch (...) {
            abandon(stream, leaves_event, tensors());
            throw;
        }
    }

    const py::object& streams() const { return streams_; }

private:
    void abandon(dev::Stream stream, bool leaves_event, const py::tuple& tensors) const noexcept {
        try {
            if (!is_cuda())
                streams_.attr("record")(tensors);
            else if (leaves_event)
                mark(stream);
        } catch (...) {
            // It would hide the failure that brought us here.
        }
    }
    std::optional<dev::Stream> current() const {
        if (!is_cuda()) return comm_;
        void* stream = nullptr;
        if (exchange_api()->current_stream(device_.type, device_.id, &stream) != 0) {
            PyErr_Clear();
            return std::nullopt;
        }
        return order_->is_last(stream) ? std::optional<dev::Stream>(stream) : std::nullopt;
    }
    void mark(dev::Stream stream) const {
        native_->record_event(event_, stream);
        if (order_->last_event != own_event_.ptr()) {
            PyObject* old = order_->last_event;
            order_->last_event = own_event_.inc_ref().ptr();
            Py_XDECREF(old);
        }
        order_->is_marked = 1;
    }

    dlpack::Device device_{dlpack::kCpu, 0};
    std::shared_ptr<dev::Device> native_;
    dev::Stream comm_ = nullptr;
    py::object streams_, order_owner_, own_event_;
    dev::Event event_ = nullptr;
    StreamOrder* order_ = nullptr;
};

}  // namespace deep_ep::bindings
