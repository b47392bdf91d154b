// The Python module of the CUDA library. Importing it registers the CUDA kernels of the ops whose
// schemas bindings/library.cpp defines; it says what it was compiled for.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <cuda_runtime_api.h>

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module &&
      (PyModule_AddStringConstant(module, "architectures", BATON_CUDA_ARCHITECTURES) < 0 ||
       PyModule_AddIntConstant(module, "toolkit", CUDART_VERSION) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
