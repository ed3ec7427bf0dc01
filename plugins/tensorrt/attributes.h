// An operator's attributes as TensorRT's plugin fields: which there are, read from fields, written to fields.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tokprune {

// An attribute of the ONNX node, held by a member of the struct `Call`: one of the two is given.
template <typename Call>
struct Attribute {
    char const* name;
    int32_t Call::* integer;
    float Call::* real;

    constexpr Attribute(char const* name, int32_t Call::* member) : name(name), integer(member), real(nullptr) {}
    constexpr Attribute(char const* name, float Call::* member) : name(name), integer(nullptr), real(member) {}

    nvinfer1::PluginFieldType type() const {
        return integer != nullptr ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
    }

    void const* address(Call const& call) const {
        return integer != nullptr ? static_cast<void const*>(&(call.*integer)) : &(call.*real);
    }

    void read(Call& call, nvinfer1::PluginField const& field) const {
        if (field.type != type() || field.length != 1 || field.data == nullptr) {
            throw std::invalid_argument(std::string("attribute ") + name + " is not one " +
                                        (integer != nullptr ? "int32" : "float32"));
        }
        if (integer != nullptr) {
            call.*integer = *static_cast<int32_t const*>(field.data);
        } else {
            call.*real = *static_cast<float const*>(field.data);
        }
    }
};

// Fields of `attributes`, whose data lie in `call`; without one, names and types alone.
template <typename Call, size_t count>
std::array<nvinfer1::PluginField, count> makeFields(std::array<Attribute<Call>, count> const& attributes,
                                                    Call const* call) {
    std::array<nvinfer1::PluginField, count> fields;
    for (size_t i = 0; i < count; ++i) {
        void const* const data = call == nullptr ? nullptr : attributes[i].address(*call);
        fields[i] = nvinfer1::PluginField(attributes[i].name, data, attributes[i].type(), call == nullptr ? 0 : 1);
    }
    return fields;
}

// The values in `fields`, which must give every one of `attributes` once and nothing else; throws naming what is wrong.
template <typename Call, size_t count>
Call readFields(std::array<Attribute<Call>, count> const& attributes, nvinfer1::PluginFieldCollection const* fields) {
    Call call{};
    std::array<bool, count> given{};
    for (int32_t f = 0; fields != nullptr && f < fields->nbFields; ++f) {
        nvinfer1::PluginField const& field = fields->fields[f];
        size_t i = 0;
        while (i < count && std::string(attributes[i].name) != field.name) {
            ++i;
        }
        if (i == count || given[i]) {
            throw std::invalid_argument(std::string("attribute ") + field.name +
                                        (i == count ? " is unknown" : " is given twice"));
        }
        attributes[i].read(call, field);
        given[i] = true;
    }
    for (size_t i = 0; i < count; ++i) {
        if (!given[i]) {
            throw std::invalid_argument(std::string("attribute ") + attributes[i].name + " is missing");
        }
    }
    return call;
}

}  // namespace tokprune
