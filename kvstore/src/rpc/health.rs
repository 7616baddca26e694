//! gRPC's own health service: serving, for as long as this answers at all.

use std::pin::Pin;

use keelson_proto::grpc_health_v1::health_check_response::ServingStatus;
use keelson_proto::grpc_health_v1::health_server::Health;
use keelson_proto::grpc_health_v1::{HealthCheckRequest, HealthCheckResponse};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

#[derive(Clone, Copy)]
pub(crate) struct HealthService;

/// etcd registers the whole server only, under the empty name.
fn serving(request: &HealthCheckRequest) -> Option<HealthCheckResponse> {
    request.service.is_empty().then_some(HealthCheckResponse { status: ServingStatus::Serving as i32 })
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        serving(request.get_ref()).map(Response::new).ok_or_else(|| Status::not_found("unknown service"))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let first =
            serving(request.get_ref()).unwrap_or(HealthCheckResponse { status: ServingStatus::ServiceUnknown as i32 });
        // The state never changes; the stream stays open until the client leaves.
        let stream = tokio_stream::once(Ok(first)).chain(tokio_stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }
}
