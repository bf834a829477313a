// Binds functions so that errors about wrong arguments are short: pybind11's own errors print every argument,
// even gigabytes of gradients.
#pragma once

#include <string>

#include <pybind11/pybind11.h>

namespace steadygrad::bindings {

// The first argument of an overload that is chosen if no other one fits, even after conversions.
struct AnyArgument {
  pybind11::handle argument;
};

[[noreturn]] inline void throw_unfit(const char* name, const AnyArgument& first, const pybind11::args& rest,
                                     const pybind11::kwargs& named) {
  std::string got = Py_TYPE(first.argument.ptr())->tp_name;
  for (const pybind11::handle argument : rest) got += std::string(", ") + Py_TYPE(argument.ptr())->tp_name;
  for (const auto& [key, argument] : named) {
    got += ", " + std::string(pybind11::str(key)) + "=" + Py_TYPE(argument.ptr())->tp_name;
  }
  throw pybind11::type_error(std::string(name) + ": expected the arguments that help() lists, got (" + got +
                             ")");
}

template <class Function, class... Extra>
void define(pybind11::module_& module, const char* name, Function function, const Extra&... extra) {
  module.def(name, function, extra...);
  module.def(name, [name](const AnyArgument& first, const pybind11::args& rest,
                          const pybind11::kwargs& named) { throw_unfit(name, first, rest, named); });
}

// Binds a method in the same way.
template <class Class, class... Options, class Function, class... Extra>
void define(pybind11::class_<Class, Options...>& type, const char* name, Function function,
            const Extra&... extra) {
  type.def(name, function, extra...);
  type.def(name, [name](const Class&, const AnyArgument& first, const pybind11::args& rest,
                        const pybind11::kwargs& named) { throw_unfit(name, first, rest, named); });
}

}  // namespace steadygrad::bindings

namespace pybind11::detail {

template <>
struct type_caster<steadygrad::bindings::AnyArgument> {
  PYBIND11_TYPE_CASTER(steadygrad::bindings::AnyArgument, const_name("object"));
  // In the pass without conversions it does not fit, since another overload may fit with conversions.
  bool load(handle source, bool convert) {
    value.argument = source;
    return convert;
  }
};

}  // namespace pybind11::detail
