//! Typed access to rows for `apply`: one place where "the key says so, the value is something else" becomes an error.
//! Must never hide a missing row: absent and damaged are different answers.

use bytes::Bytes;
use stentor_proto::internal;

use crate::{
    apply::ApplyError,
    key::RowKey,
    rows::{Row, Rows},
};

/// A message that is the value of a row.
pub(crate) trait RowValue: Sized {
    fn of(row: &Row) -> Option<&Self>;
    fn of_mut(row: &mut Row) -> Option<&mut Self>;
}

macro_rules! row_values {
    ($($variant:ident($message:ident),)*) => {
        $(impl RowValue for internal::$message {
            fn of(row: &Row) -> Option<&Self> {
                match row { Row::$variant(value) => Some(value), _ => None }
            }

            fn of_mut(row: &mut Row) -> Option<&mut Self> {
                match row { Row::$variant(value) => Some(value), _ => None }
            }
        })*
    };
}

row_values! {
    Conversation(ConversationRow),
    Participant(ParticipantRow),
    SendState(SendStateRow),
    ClientKey(ClientKeyRow),
    ClientScope(ClientScopeRow),
    ClientOrder(ClientOrderRow),
    User(UserRow),
    Device(DeviceRow),
    UserConversation(UserConversationRow),
    Cursor(CursorRow),
    Cluster(ClusterRow),
    Broker(BrokerRow),
    Placement(PlacementRow),
}

/// Reads a row.
pub(crate) fn read<'r, T: RowValue>(rows: &'r mut impl Rows, key: &RowKey) -> Result<Option<&'r T>, ApplyError> {
    match rows.get(key)? {
        None => Ok(None),
        Some(row) => T::of(row).map(Some).ok_or_else(|| ApplyError::Damaged(format!("{key:?} holds another row"))),
    }
}

/// A row to change in place. The same command must have read it, and found it.
pub(crate) fn change<'r, T: RowValue>(rows: &'r mut impl Rows, key: &RowKey) -> Result<&'r mut T, ApplyError> {
    rows.get_mut(key)
        .and_then(T::of_mut)
        .ok_or_else(|| ApplyError::Damaged(format!("{key:?} was read and is not there any more")))
}

/// A copy that does not share the entry's memory: what a row keeps would otherwise pin the whole entry.
pub(crate) fn own(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}
