//! `stentor.v1.Users`. Cursor moves belong to a session and its fencing number, which a plain call does not have: they
//! are refused here until calls can open sessions. Must never move a cursor without its fence.

use stentor_proto::{
    reason::Reason,
    v1::{CursorsMoved, MoveCursors, users_server::Users},
};
use tonic::{Request, Response, Status};

use super::{Api, because};

#[tonic::async_trait]
impl Users for Api {
    async fn move_cursors(&self, request: Request<MoveCursors>) -> Result<Response<CursorsMoved>, Status> {
        self.caller(&request)?;
        Err(because(Reason::NotBuilt))
    }
}
