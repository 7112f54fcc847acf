//! Exactly once: two ways to recognise a send that was seen before. `send_no` is the device's own count, `client_id`
//! the caller's own key. Must never let a second `seq` happen: what it has forgotten it refuses.

pub mod client_id;
pub mod send_no;
