// The types of CUDA that TensorRT's headers name, for machines without a toolkit. CMake takes the real header where
// there is one.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
