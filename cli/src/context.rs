//! Who acts, and on which cluster: from the options, the environment and a development cluster's folder. Must never
//! guess between two answers: what contradicts itself is misuse.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use stentor_proto::ids::{AppId, DeviceId, UserId};
use stentor_transport::token::{self, Claims};

use crate::{
    args::ContextArgs,
    cluster_file::{ClusterFile, SigningKey},
    devices::{self, HeldDevice},
    failure::Failure,
};

/// How long tokens of a development cluster are good for.
const TOKEN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a session with a gateway needs.
#[derive(Debug)]
pub(crate) struct SessionContext {
    /// Gateways, any of which will do.
    pub(crate) gateways: Vec<SocketAddr>,
    /// The certificate authority to trust.
    pub(crate) ca: PathBuf,
    /// Says who acts.
    pub(crate) token: String,
    /// The device, where this process holds it: its cursors live in its folder. Without one they are forgotten.
    pub(crate) held: Option<HeldDevice>,
}

/// What calls of the gRPC API need.
#[derive(Debug, Clone)]
pub(crate) struct ApiContext {
    /// Brokers' APIs, any of which may know the leader.
    pub(crate) apis: Vec<SocketAddr>,
    /// The certificate authority to trust.
    pub(crate) ca: PathBuf,
    /// Says who calls.
    pub(crate) token: String,
}

/// For `send`, `tail` and `history`.
pub(crate) fn session(args: &ContextArgs) -> Result<SessionContext, Failure> {
    let cluster = cluster(args)?;
    let ca = ca(args, cluster.as_ref())?;
    let gateways = match (args.server, &cluster) {
        (Some(server), _) => vec![server],
        (None, Some(cluster)) => cluster.gateways(),
        (None, None) => return Err(no_cluster()),
    };
    if let Some(token) = &args.token {
        forbid_names(args)?;
        return Ok(SessionContext { gateways, ca, token: token.clone(), held: None });
    }
    let (Some(dir), Some(cluster)) = (&args.dir, &cluster) else { return Err(no_cluster()) };
    let user = acting_user(args, cluster)?;
    let held = devices::hold(dir, user.as_str(), args.device.as_deref())?;
    let token = mint(&cluster.signing_key, &cluster.app, &user, Some(held.device.clone()), false)?;
    Ok(SessionContext { gateways, ca, token, held: Some(held) })
}

/// For `conversation`: calls in a user's name.
pub(crate) fn api(args: &ContextArgs) -> Result<ApiContext, Failure> {
    api_with(args, |cluster| {
        let user = acting_user(args, cluster)?;
        let device = args.device.as_deref().map(DeviceId::new).transpose()?;
        mint(&cluster.signing_key, &cluster.app, &user, device, false)
    })
}

/// For `admin`.
pub(crate) fn admin(args: &ContextArgs) -> Result<ApiContext, Failure> {
    api_with(args, |cluster| Ok(cluster.admin_token.clone()))
}

fn api_with(
    args: &ContextArgs,
    token: impl FnOnce(&ClusterFile) -> Result<String, Failure>,
) -> Result<ApiContext, Failure> {
    let cluster = cluster(args)?;
    let ca = ca(args, cluster.as_ref())?;
    let apis = match (args.server, &cluster) {
        (Some(server), _) => vec![server],
        (None, Some(cluster)) => cluster.apis(),
        (None, None) => return Err(no_cluster()),
    };
    let token = match (&args.token, &cluster) {
        (Some(token), _) => forbid_names(args).map(|()| token.clone())?,
        (None, Some(cluster)) => token(cluster)?,
        (None, None) => return Err(no_cluster()),
    };
    Ok(ApiContext { apis, ca, token })
}

/// A token for one user's device, signed with the key of `--dir`.
pub(crate) fn minted(args: &ContextArgs, app: Option<&str>) -> Result<String, Failure> {
    let cluster = cluster(args)?.ok_or_else(no_cluster)?;
    let (Some(user), Some(device)) = (&args.user, &args.device) else {
        return Err(Failure::misuse("a token needs --user and --device"));
    };
    let app = app.unwrap_or(&cluster.app);
    mint(&cluster.signing_key, app, &UserId::new(user)?, Some(DeviceId::new(device)?), false)
}

/// Signs a token with a development key, good for 30 days.
pub(crate) fn mint(
    key: &SigningKey,
    app: &str,
    user: &UserId,
    device: Option<DeviceId>,
    admin: bool,
) -> Result<String, Failure> {
    let path = &key.private_key;
    let pem = std::fs::read_to_string(path)
        .map_err(|error| Failure::failed(format_args!("cannot read the signing key {}: {error}", path.display())))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let expires_s = (now + TOKEN_LIFETIME).as_secs();
    let claims = Claims { app: AppId::new(app)?, user: user.clone(), device, admin, expires_s };
    token::mint(&pem, &key.kid, &claims).map_err(Failure::failed)
}

fn cluster(args: &ContextArgs) -> Result<Option<ClusterFile>, Failure> {
    let Some(dir) = &args.dir else { return Ok(None) };
    match ClusterFile::read(dir)? {
        Some(cluster) => Ok(Some(cluster)),
        // A token and a server are enough without the folder, which may come from the environment.
        None if args.token.is_some() && args.server.is_some() => Ok(None),
        None => Err(Failure::misuse(format_args!("{} has no cluster.json; is a cluster running there?", show(dir)))),
    }
}

fn ca(args: &ContextArgs, cluster: Option<&ClusterFile>) -> Result<PathBuf, Failure> {
    match (&args.ca, cluster) {
        (Some(ca), _) => Ok(ca.clone()),
        (None, Some(cluster)) => Ok(cluster.ca.clone()),
        (None, None) => Err(Failure::misuse("say whom to trust: --ca FILE, STENTOR_CA, or --dir D")),
    }
}

fn acting_user(args: &ContextArgs, cluster: &ClusterFile) -> Result<UserId, Failure> {
    match (&args.user, cluster.users.first()) {
        (Some(user), _) => Ok(UserId::new(user)?),
        (None, Some(first)) => Ok(UserId::new(&first.user)?),
        (None, None) => Err(Failure::misuse("say who acts: --user U")),
    }
}

/// A token says who acts; other names beside it would be ignored, and that must not happen silently.
fn forbid_names(args: &ContextArgs) -> Result<(), Failure> {
    if args.user.is_some() || args.device.is_some() {
        return Err(Failure::misuse("a token says who acts; --user and --device cannot be given with it"));
    }
    Ok(())
}

fn no_cluster() -> Failure {
    Failure::misuse("say which cluster: --dir D (or STENTOR_DIR), or --server, --token and --ca")
}

fn show(dir: &Path) -> std::path::Display<'_> {
    dir.display()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster_file::User;

    fn args() -> ContextArgs {
        ContextArgs { dir: None, user: None, device: None, token: None, server: None, ca: None, json: false }
    }

    fn cluster_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let (private, _) = token::generate_key().unwrap();
        let private_key = dir.path().join("dev.pem");
        std::fs::write(&private_key, private).unwrap();
        let file = ClusterFile {
            cluster_id: "c".into(),
            nodes: vec![],
            ca: "/ca.pem".into(),
            app: "demo".into(),
            admin_token: "admin".into(),
            users: vec![User { user: "ann".into(), device: "phone".into(), token: String::new() }],
            signing_key: SigningKey { kid: "dev".into(), private_key },
        };
        file.write(dir.path()).unwrap();
        dir
    }

    #[test]
    fn a_folder_is_enough_and_its_first_user_acts() {
        let dir = cluster_dir();
        let args = ContextArgs { dir: Some(dir.path().into()), ..args() };
        let context = session(&args).unwrap();
        assert_eq!(context.held.as_ref().unwrap().device.as_str(), "cli-1");
        assert!(context.held.unwrap().folder.starts_with(dir.path().join("devices/ann")));
        assert_eq!(admin(&args).unwrap().token, "admin");
    }

    #[test]
    fn a_token_needs_a_server_and_somebody_to_trust() {
        let with_token = ContextArgs { token: Some("t".into()), ..args() };
        assert!(matches!(session(&with_token), Err(Failure::Misuse(_))));
        let whole = ContextArgs {
            server: Some(([127, 0, 0, 1], 7443).into()),
            ca: Some("/ca.pem".into()),
            ..with_token.clone()
        };
        assert!(session(&whole).unwrap().held.is_none());
        let named = ContextArgs { user: Some("bob".into()), ..whole };
        assert!(matches!(session(&named), Err(Failure::Misuse(_))));
    }

    #[test]
    fn bad_ids_and_absent_clusters_are_misuse() {
        let dir = cluster_dir();
        let in_dir = ContextArgs { dir: Some(dir.path().into()), ..args() };
        let slash = ContextArgs { user: Some("a/b".into()), ..in_dir.clone() };
        assert!(matches!(session(&slash), Err(Failure::Misuse(_))));
        let empty = tempfile::tempdir().unwrap();
        let nowhere = ContextArgs { dir: Some(empty.path().into()), ..args() };
        assert!(matches!(session(&nowhere), Err(Failure::Misuse(_))));
        assert!(matches!(minted(&in_dir, None), Err(Failure::Misuse(_))));
    }
}
