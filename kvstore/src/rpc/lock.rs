//! The Lock service: a queue of keys, oldest first, each as long-lived as its lease (contract 2.12).
//!
//! A request puts its key behind the others and waits until all that are older are deleted. One that is no longer wanted, or
//! that fails while it waits, takes its key out again; nobody is stuck behind a client that has gone.
//!
//! What it does not do: keep a lease alive, or ask who unlocks: both are the clients' affair, as in etcd.

use bytes::Bytes;
use keelson_proto::etcdserverpb::ResponseHeader;
use keelson_proto::etcdserverpb::request_op::Request as Op;
use keelson_proto::v3lockpb::lock_server::Lock;
use keelson_proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};
use kvstore_core::Error;
use tonic::{Request, Response, Status};

use super::recipe::{self, Recipe, found, revision};
use super::status::recipe_status;

#[derive(Clone)]
pub(super) struct LockService {
    recipe: Recipe,
}

impl LockService {
    pub(super) fn new(recipe: Recipe) -> LockService {
        LockService { recipe }
    }

    async fn lock(&self, request: LockRequest) -> Result<LockResponse, Error> {
        let lease = self.recipe.session(request.lease).await?;
        let prefix = recipe::prefix_of(&request.name);
        let key = recipe::key_of(&prefix, lease);
        let holder = || Op::RequestRange(recipe::oldest_of(&prefix));
        // A lease that has its key already stands where it stands.
        let success = vec![recipe::put(&key, Bytes::new(), lease), holder()];
        let failure = vec![Op::RequestRange(recipe::get(&key)), holder()];
        let response = self.recipe.if_created_at(&key, 0, success, failure).await?;
        let mine = if response.succeeded {
            revision(response.header.as_ref())
        } else {
            found(&response, 0).map_or(0, |kv| kv.create_revision)
        };
        let header = match found(&response, 1) {
            Some(holder) if holder.create_revision != mine => self.wait(&prefix, &key, mine).await?,
            _ => response.header.unwrap_or_default(),
        };
        Ok(LockResponse { header: Some(header), key })
    }

    /// Waits for the lock with a key that stands in the queue.
    async fn wait(&self, prefix: &Bytes, key: &Bytes, mine: i64) -> Result<ResponseHeader, Error> {
        let mut place = Place { recipe: &self.recipe, key: Some(key.clone()) };
        let waited = async {
            self.recipe.wait_deletes(prefix, mine - 1).await?;
            self.recipe.get(recipe::get(key)).await
        };
        let own = match waited.await {
            Ok(own) => own,
            Err(error) => {
                // What comes of it is not the client's concern: its lease ends it in any case.
                let _ = self.recipe.delete(key.clone()).await;
                place.key = None;
                return Err(error);
            }
        };
        place.key = None;
        if own.kvs.is_empty() {
            return Err(Error::Other("mutex: session is expired"));
        }
        Ok(own.header.unwrap_or_default())
    }
}

/// A place in the queue, left when its request is dropped: the client has gone, or its deadline has passed.
struct Place<'a> {
    recipe: &'a Recipe,
    key: Option<Bytes>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            let recipe = self.recipe.clone();
            self.recipe.afterwards("a place in a lock's queue", async move { recipe.delete(key).await.map(drop) });
        }
    }
}

#[tonic::async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        self.lock(request.into_inner()).await.map(Response::new).map_err(|e| recipe_status(&e))
    }

    async fn unlock(&self, request: Request<UnlockRequest>) -> Result<Response<UnlockResponse>, Status> {
        let header = self.recipe.delete(request.into_inner().key).await.map_err(|e| recipe_status(&e))?;
        Ok(Response::new(UnlockResponse { header: Some(header) }))
    }
}
