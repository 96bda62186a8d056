// segment_beats for NumPy arrays: no PyTorch in here. beats.py checks what a user gives.
#include <pybind11/numpy.h>

#include <limits>

#include "beats.h"

namespace py = pybind11;

template <class T> static py::tuple segment_beats(const py::array_t<T, py::array::c_style>& ecg, double fs) {
    const py::ssize_t records = ecg.shape(0);
    if (records > std::numeric_limits<int>::max())
        throw py::value_error("segment_beats: it takes fewer than 2^31 records");
    const beats::Plan plan = beats::make_plan(fs, int(ecg.shape(2)));
    py::array_t<int> peaks({records, py::ssize_t(plan.max_peaks())}), count(records);
    const T* x = ecg.data();
    int *p = peaks.mutable_data(), *c = count.mutable_data();
    {
        const py::gil_scoped_release others_may_run;
        beats::segment_cpu(x, sizeof(T) == 4, int(records), int(ecg.shape(1)), plan, p, c);
    }
    return py::make_tuple(peaks, count);
}

PYBIND11_MODULE(_beats, module) {  // noconvert: a copy would be silent
    module.def("segment_beats", segment_beats<float>, py::arg("ecg").noconvert(), py::arg("fs"));
    module.def("segment_beats", segment_beats<int16_t>, py::arg("ecg").noconvert(), py::arg("fs"));
}
