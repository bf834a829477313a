// Loads and stores with a cache hint, which is ignored.
#pragma once

namespace steadygrad::emulation {

// The stored value's type comes from the pointer alone, as in CUDA.
template <class T>
struct Identity {
  using type = T;
};
template <class T>
using Exactly = typename Identity<T>::type;

}  // namespace steadygrad::emulation

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldca(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldlu(const T* address) {
  return *address;
}
template <class T>
T __ldcv(const T* address) {
  return *address;
}

template <class T>
void __stwb(T* address, steadygrad::emulation::Exactly<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, steadygrad::emulation::Exactly<T> value) {
  *address = value;
}
template <class T>
void __stcs(T* address, steadygrad::emulation::Exactly<T> value) {
  *address = value;
}
template <class T>
void __stwt(T* address, steadygrad::emulation::Exactly<T> value) {
  *address = value;
}
