//! The device's session ends, in good order or from one moment to the next, and a new one begins at another gateway: what
//! was under way stays unknown unless it had its answer. Must never keep two sessions of one device.

use super::{Connect, Dice, actor::Actor};

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reconnect {
    in_good_order: bool,
    /// The device has lost its cursors: everything comes again.
    forgets: bool,
}

impl Reconnect {
    pub(super) fn sample(dice: &mut Dice) -> Self {
        Self { in_good_order: dice.chance(1, 2), forgets: dice.chance(1, 5) }
    }

    pub(super) async fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        match self.in_good_order {
            true => actor.close().await,
            false => actor.cut(),
        }
        if self.forgets {
            actor.cursors = std::sync::Arc::default();
        }
        let patience = actor.stage.plan.patience;
        // Without a session the next operation tries again.
        let _ = actor.connect_within(patience).await;
    }
}
