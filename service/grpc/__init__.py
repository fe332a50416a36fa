"""The Open Inference Protocol over gRPC (LVM_GRPC_PORT, extra `grpc`): the routes of HTTP's /v2 as remote calls."""
