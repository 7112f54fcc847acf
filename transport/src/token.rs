//! Tokens: JWTs in which an integrator's backend says which user on which device is calling. Verified against the keys
//! of the token's own app; must never accept an algorithm that its key was not made for.

use std::collections::BTreeMap;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::{KeyPair, PKCS_ED25519};
use serde::{Deserialize, Serialize};
use stentor_proto::{
    ids::{AppId, DeviceId, UserId},
    internal::{AppInfo, SigningKey},
    reason::Reason,
};
use thiserror::Error;

use crate::Host;

/// No honest token is longer; a longer one is refused before anything is decoded.
pub const MAX_TOKEN_BYTES: usize = 4 * 1024;

const ED25519_KEY_BYTES: usize = 32;
/// An uncompressed point on P-256.
const P256_KEY_BYTES: usize = 65;

/// A key that tokens cannot be made with: its owner's fault.
#[derive(Debug, Error)]
pub enum KeyError {
    /// No PEM of a private Ed25519 or P-256 key in PKCS#8.
    #[error("not a private Ed25519 or P-256 key in PEM (PKCS#8)")]
    NotAKey,
    /// The system gave no randomness, or a library refused.
    #[error("cannot make a key or a token: {0}")]
    Failed(String),
}

/// Who calls, as a verified token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The tenant.
    pub app: AppId,
    /// The user.
    pub user: UserId,
    /// The device; `None` for a backend that calls in the user's name.
    pub device: Option<DeviceId>,
    /// Whether admin calls are allowed.
    pub admin: bool,
    /// When the token ends, in seconds since the Unix epoch.
    pub expires_s: u64,
}

/// What stands in the token.
#[derive(Serialize, Deserialize)]
struct Payload {
    app: String,
    sub: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dev: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    adm: bool,
    #[serde(default)]
    iat: u64,
    exp: u64,
}

/// The public keys of all apps.
#[derive(Debug, Default)]
pub struct Keys {
    /// By (app, kid): two apps may use the same kid.
    keys: BTreeMap<(String, String), (Algorithm, DecodingKey)>,
}

impl Keys {
    /// The keys as the placement has them. One that cannot be used is left out with a warning: it must not lock out
    /// the others. So are keys that are marked as made for development, unless `development` says that this is one.
    pub fn new(apps: Vec<AppInfo>, development: bool) -> Self {
        let mut keys = BTreeMap::new();
        for app in apps {
            for key in &app.keys {
                let kid = String::from_utf8_lossy(&key.kid).into_owned();
                if key.dev && !development {
                    tracing::warn!(app = app.app, kid, "a development key signs nothing here: development is off");
                    continue;
                }
                match public_key(key) {
                    Some(public) => drop(keys.insert((app.app.clone(), kid), public)),
                    None => tracing::warn!(app = app.app, kid, "signing key cannot be used"),
                }
            }
        }
        Self { keys }
    }

    /// Who the token's bearer is. `now_s` is the wall clock in seconds since the Unix epoch. Refused with
    /// `TOKEN_EXPIRED`, with `WRONG_APP` when the token names another app than the one whose key signed it, and with
    /// `UNAUTHENTICATED` for everything else.
    pub fn verify(&self, token: &str, now_s: u64) -> Result<Claims, Reason> {
        let bad = |_| Reason::Unauthenticated;
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Reason::Unauthenticated);
        }
        let kid = jsonwebtoken::decode_header(token).map_err(bad)?.kid.ok_or(Reason::Unauthenticated)?;
        // Not believed before the signature is checked: it only says whose key to check with.
        let app = jsonwebtoken::dangerous::insecure_decode_claims::<Payload>(token).map_err(bad)?.app;
        let Some((algorithm, key)) = self.keys.get(&(app, kid.clone())) else {
            return Err(self.foreign(token, &kid));
        };
        let payload = payload(token, *algorithm, key).ok_or(Reason::Unauthenticated)?;
        if payload.exp <= now_s {
            return Err(Reason::TokenExpired);
        }
        let id = |_| Reason::Unauthenticated;
        Ok(Claims {
            app: AppId::new(payload.app).map_err(id)?,
            user: UserId::new(payload.sub).map_err(id)?,
            device: payload.dev.map(DeviceId::new).transpose().map_err(id)?,
            admin: payload.adm,
            expires_s: payload.exp,
        })
    }

    /// A token that another app's key really signed is a mix-up worth naming; anything else is nobody's.
    fn foreign(&self, token: &str, kid: &str) -> Reason {
        let signed = |(algorithm, key): &(Algorithm, DecodingKey)| payload(token, *algorithm, key).is_some();
        let mut candidates = self.keys.iter().filter(|((_, k), _)| k == kid).take(MAX_CANDIDATES);
        if candidates.any(|(_, key)| signed(key)) { Reason::WrongApp } else { Reason::Unauthenticated }
    }
}

/// Forged tokens must not buy a signature check per app.
const MAX_CANDIDATES: usize = 4;

fn payload(token: &str, algorithm: Algorithm, key: &DecodingKey) -> Option<Payload> {
    // The key's own algorithm and no other: a public key is no secret, and HS256 would take it for one.
    let mut validation = Validation::new(algorithm);
    // Time is an argument here, and the caller wants to tell an expired token from a forged one.
    validation.validate_exp = false;
    validation.validate_aud = false;
    jsonwebtoken::decode::<Payload>(token, key, &validation).ok().map(|data| data.claims)
}

fn public_key(key: &SigningKey) -> Option<(Algorithm, DecodingKey)> {
    let (algorithm, public, bytes) = match &key.algorithm[..] {
        b"EdDSA" => (Algorithm::EdDSA, DecodingKey::from_ed_pem(&key.public_key_pem).ok()?, ED25519_KEY_BYTES),
        b"ES256" => (Algorithm::ES256, DecodingKey::from_ec_pem(&key.public_key_pem).ok()?, P256_KEY_BYTES),
        _ => return None,
    };
    // The library slices without asking: a shorter key would panic at the first token.
    (public.try_get_as_bytes().ok()?.len() == bytes).then_some((algorithm, public))
}

/// Makes a token for `claims`, issued now, with a private key in PEM (PKCS#8; Ed25519 or P-256).
pub fn mint(private_key_pem: &str, kid: &str, claims: &Claims) -> Result<String, KeyError> {
    mint_at(private_key_pem, kid, claims, Host::real().wall_ms() / 1_000)
}

/// The same, issued at `now_s` seconds since the Unix epoch.
pub fn mint_at(private_key_pem: &str, kid: &str, claims: &Claims, now_s: u64) -> Result<String, KeyError> {
    let pem = private_key_pem.as_bytes();
    let (algorithm, key) = match (EncodingKey::from_ed_pem(pem), EncodingKey::from_ec_pem(pem)) {
        (Ok(key), _) => (Algorithm::EdDSA, key),
        (_, Ok(key)) => (Algorithm::ES256, key),
        _ => return Err(KeyError::NotAKey),
    };
    let payload = Payload {
        app: claims.app.as_str().into(),
        sub: claims.user.as_str().into(),
        dev: claims.device.as_ref().map(|d| d.as_str().into()),
        adm: claims.admin,
        iat: now_s.min(claims.expires_s),
        exp: claims.expires_s,
    };
    let header = Header { kid: Some(kid.into()), ..Header::new(algorithm) };
    jsonwebtoken::encode(&header, &payload, &key).map_err(|e| KeyError::Failed(e.to_string()))
}

/// A new Ed25519 key: (private PEM in PKCS#8, public PEM).
pub fn generate_key() -> Result<(String, String), KeyError> {
    let seed: [u8; 32] = ring::rand::generate(&ring::rand::SystemRandom::new())
        .map_err(|_| KeyError::Failed("no randomness".into()))?
        .expose();
    key_of_seed(seed)
}

/// The Ed25519 key that a seed stands for: (private PEM in PKCS#8, public PEM). Who knows the seed has the key.
pub fn key_of_seed(seed: [u8; 32]) -> Result<(String, String), KeyError> {
    /// RFC 8410: version 0, Ed25519, and the seed as an octet string in an octet string. Version 1, which key
    /// generators also write, is not understood by every verifier's library.
    const PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    let der = [&PREFIX[..], &seed].concat();
    let pair = KeyPair::from_pkcs8_der_and_sign_algo(&der.into(), &PKCS_ED25519)
        .map_err(|e| KeyError::Failed(e.to_string()))?;
    Ok((pair.serialize_pem(), pair.public_key_pem()))
}

#[cfg(test)]
mod tests {
    use rcgen::PKCS_ECDSA_P256_SHA256;

    use super::*;

    const NOW_S: u64 = 1_800_000_000;

    fn claims(app: &str) -> Claims {
        Claims {
            app: AppId::new(app).unwrap(),
            user: UserId::new("[Mad]Max").unwrap(),
            device: Some(DeviceId::new("phone").unwrap()),
            admin: false,
            expires_s: NOW_S + 60,
        }
    }

    fn app(name: &str, kid: &str, algorithm: &str, public_pem: &str) -> AppInfo {
        let key = SigningKey {
            kid: kid.to_owned().into(),
            algorithm: algorithm.to_owned().into(),
            public_key_pem: public_pem.to_owned().into(),
            dev: true,
        };
        AppInfo { app: name.into(), keys: vec![key] }
    }

    #[test]
    fn tokens_of_both_algorithms_say_who_calls() {
        let (private, public) = generate_key().unwrap();
        let ec = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let keys =
            Keys::new(vec![app("a", "ed", "EdDSA", &public), app("b", "ec", "ES256", &ec.public_key_pem())], true);
        assert_eq!(keys.verify(&mint(&private, "ed", &claims("a")).unwrap(), NOW_S), Ok(claims("a")));
        assert_eq!(keys.verify(&mint(&ec.serialize_pem(), "ec", &claims("b")).unwrap(), NOW_S), Ok(claims("b")));
        let backend = Claims { device: None, admin: true, ..claims("a") };
        assert_eq!(keys.verify(&mint(&private, "ed", &backend).unwrap(), NOW_S), Ok(backend));
    }

    #[test]
    fn an_expired_token_is_told_from_a_forged_one() {
        let ((private, public), (forger, _)) = (generate_key().unwrap(), generate_key().unwrap());
        let keys = Keys::new(vec![app("a", "k", "EdDSA", &public)], true);
        let token = mint(&private, "k", &claims("a")).unwrap();
        assert_eq!(keys.verify(&token, NOW_S + 59).map(|c| c.expires_s), Ok(NOW_S + 60));
        assert_eq!(keys.verify(&token, NOW_S + 60), Err(Reason::TokenExpired));
        let forged = mint(&forger, "k", &claims("a")).unwrap();
        assert_eq!(keys.verify(&forged, NOW_S), Err(Reason::Unauthenticated));
        assert_eq!(keys.verify(&forged, NOW_S + 60), Err(Reason::Unauthenticated));
    }

    #[test]
    fn a_public_key_is_no_secret() {
        let (_, public) = generate_key().unwrap();
        let keys = Keys::new(vec![app("a", "k", "EdDSA", &public)], true);
        let payload = Payload { app: "a".into(), sub: "u".into(), dev: None, adm: true, iat: NOW_S, exp: NOW_S + 60 };
        let der = keys.keys.values().next().unwrap().1.try_get_as_bytes().unwrap().to_vec();
        for secret in [public.as_bytes(), &der] {
            let header = Header { kid: Some("k".into()), ..Header::new(Algorithm::HS256) };
            let token = jsonwebtoken::encode(&header, &payload, &EncodingKey::from_secret(secret)).unwrap();
            assert_eq!(keys.verify(&token, NOW_S), Err(Reason::Unauthenticated));
        }
    }

    #[test]
    fn a_key_of_one_algorithm_takes_no_token_of_the_other() {
        let (_, public) = generate_key().unwrap();
        let ec = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let keys = Keys::new(vec![app("a", "k", "EdDSA", &public)], true);
        let token = mint(&ec.serialize_pem(), "k", &claims("a")).unwrap();
        assert_eq!(keys.verify(&token, NOW_S), Err(Reason::Unauthenticated));
    }

    #[test]
    fn unknown_keys_and_foreign_apps_are_refused() {
        let ((a, a_public), (b, b_public)) = (generate_key().unwrap(), generate_key().unwrap());
        let keys = Keys::new(vec![app("a", "ka", "EdDSA", &a_public), app("b", "kb", "EdDSA", &b_public)], true);
        assert_eq!(keys.verify(&mint(&a, "nobody", &claims("a")).unwrap(), NOW_S), Err(Reason::Unauthenticated));
        assert_eq!(keys.verify(&mint(&a, "ka", &claims("b")).unwrap(), NOW_S), Err(Reason::WrongApp));
        assert_eq!(keys.verify(&mint(&a, "ka", &claims("c")).unwrap(), NOW_S), Err(Reason::WrongApp));
        assert_eq!(keys.verify(&mint(&b, "ka", &claims("b")).unwrap(), NOW_S), Err(Reason::Unauthenticated));
        // The same kid in two apps: each is checked with its own key.
        let keys = Keys::new(vec![app("a", "k", "EdDSA", &a_public), app("b", "k", "EdDSA", &b_public)], true);
        assert_eq!(keys.verify(&mint(&b, "k", &claims("b")).unwrap(), NOW_S), Ok(claims("b")));
        assert_eq!(keys.verify(&mint(&a, "k", &claims("b")).unwrap(), NOW_S), Err(Reason::Unauthenticated));
    }

    #[test]
    fn every_changed_byte_is_found() {
        let (private, public) = generate_key().unwrap();
        let keys = Keys::new(vec![app("a", "k", "EdDSA", &public)], true);
        let token = mint(&private, "k", &claims("a")).unwrap();
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(keys.verify(&changed, NOW_S).is_err(), "byte {at}");
            assert!(keys.verify(&token[..at], NOW_S).is_err(), "cut at {at}");
        }
        assert_eq!(keys.verify(&token.repeat(100), NOW_S), Err(Reason::Unauthenticated));
    }

    #[test]
    fn a_development_key_signs_nothing_in_production() {
        let ((dev, dev_public), (real, real_public)) = (generate_key().unwrap(), generate_key().unwrap());
        let mut info = app("a", "dev", "EdDSA", &dev_public);
        info.keys.extend(app("a", "real", "EdDSA", &real_public).keys);
        info.keys[1].dev = false;
        for (development, expected) in [(false, Err(Reason::Unauthenticated)), (true, Ok(claims("a")))] {
            let keys = Keys::new(vec![info.clone()], development);
            assert_eq!(keys.verify(&mint(&dev, "dev", &claims("a")).unwrap(), NOW_S), expected);
            assert_eq!(keys.verify(&mint(&real, "real", &claims("a")).unwrap(), NOW_S), Ok(claims("a")));
        }
    }

    #[test]
    fn unusable_keys_are_left_out_without_a_panic() {
        // A valid PEM of an Ed25519 key with one byte too few.
        let short = "-----BEGIN PUBLIC KEY-----\nMCkwBQYDK2VwAyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA==\n-----END PUBLIC KEY-----\n";
        let (private, public) = generate_key().unwrap();
        let apps = [short, "", "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n", &private]
            .map(|pem| app("bad", "k", "EdDSA", pem))
            .into_iter()
            .chain([
                app("rsa", "k", "RS256", &public),
                app("mixed", "k", "ES256", &public),
                app("a", "k", "EdDSA", &public),
            ]);
        let keys = Keys::new(apps.collect(), true);
        for name in ["bad", "rsa", "mixed"] {
            assert!(keys.verify(&mint(&private, "k", &claims(name)).unwrap(), NOW_S).is_err());
        }
        assert!(keys.verify(&mint(&private, "k", &claims("a")).unwrap(), NOW_S).is_ok());
    }
}
