// What goes wrong in a plugin is told to TensorRT's logger; no exception leaves the library.
#pragma once

#include <NvInferRuntime.h>

#include <exception>

#define TOKPRUNE_EXPORT __attribute__((visibility("default")))

namespace tokprune {

// TensorRT's way to its logger; nullptr for none, which sends reports to stderr.
TOKPRUNE_EXPORT void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Tells TensorRT's logger, as an error, that `who` failed by `what`.
void report(char const* who, char const* what) noexcept;

// Runs `body` on behalf of TensorRT: what it throws is reported and answered by `failed`.
template <typename Result, typename Body>
Result guarded(char const* who, Result failed, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        report(who, error.what());
    } catch (...) {
        report(who, "an exception without a message");
    }
    return failed;
}

}  // namespace tokprune
