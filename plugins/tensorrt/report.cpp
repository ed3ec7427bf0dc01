#include "report.h"

#include <atomic>
#include <cstdio>

namespace tokprune {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finderInUse{nullptr};

nvinfer1::ILogger* findLogger() noexcept {
    nvinfer1::ILoggerFinder* const finder = finderInUse.load();
    try {
        return finder == nullptr ? nullptr : finder->findLogger();
    } catch (...) {
        return nullptr;  // the report then goes to stderr
    }
}

}  // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept { finderInUse.store(finder); }

void report(char const* who, char const* what) noexcept {
    char text[1024];
    std::snprintf(text, sizeof(text), "tokprune::%s: %s", who, what);
    if (nvinfer1::ILogger* const logger = findLogger()) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
}

}  // namespace tokprune
