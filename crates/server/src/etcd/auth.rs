//! etcd's Auth service while there is no authentication: every question is answered as an etcd without users answers it.
//!
//! Left out. Adding users and roles: it would promise a protection that is not there.

use tenure_wire::etcd::etcdserverpb as pb;

use super::{failed, unary};
use crate::Context;
use crate::rpc::{Router, Status};
use crate::status::{self, EtcdError};

pub(crate) fn mount(router: &mut Router, context: &Context) {
    unary(router, context, "/etcdserverpb.Auth/AuthStatus", auth_status);
    unary(router, context, "/etcdserverpb.Auth/AuthDisable", auth_disable);
    unary(router, context, "/etcdserverpb.Auth/UserList", user_list);
    unary(router, context, "/etcdserverpb.Auth/RoleList", role_list);
    unary(router, context, "/etcdserverpb.Auth/AuthEnable", |_, _: pb::AuthEnableRequest| {
        refuse::<pb::AuthEnableResponse>(status::ROOT_USER_NOT_EXIST)
    });
    unary(router, context, "/etcdserverpb.Auth/Authenticate", |_, _: pb::AuthenticateRequest| {
        refuse::<pb::AuthenticateResponse>(status::AUTH_NOT_ENABLED)
    });
    unary(router, context, "/etcdserverpb.Auth/UserAdd", |_, request: pb::AuthUserAddRequest| {
        add::<pb::AuthUserAddResponse>(request.name, status::USER_EMPTY)
    });
    unary(router, context, "/etcdserverpb.Auth/UserGet", |_, _: pb::AuthUserGetRequest| {
        refuse::<pb::AuthUserGetResponse>(status::USER_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/UserDelete", |_, _: pb::AuthUserDeleteRequest| {
        refuse::<pb::AuthUserDeleteResponse>(status::USER_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/UserChangePassword", |_, _: pb::AuthUserChangePasswordRequest| {
        refuse::<pb::AuthUserChangePasswordResponse>(status::USER_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/UserGrantRole", |_, _: pb::AuthUserGrantRoleRequest| {
        refuse::<pb::AuthUserGrantRoleResponse>(status::USER_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/UserRevokeRole", |_, _: pb::AuthUserRevokeRoleRequest| {
        refuse::<pb::AuthUserRevokeRoleResponse>(status::USER_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/RoleAdd", |_, request: pb::AuthRoleAddRequest| {
        add::<pb::AuthRoleAddResponse>(request.name, status::ROLE_EMPTY)
    });
    unary(router, context, "/etcdserverpb.Auth/RoleGet", |_, _: pb::AuthRoleGetRequest| {
        refuse::<pb::AuthRoleGetResponse>(status::ROLE_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/RoleDelete", |_, _: pb::AuthRoleDeleteRequest| {
        refuse::<pb::AuthRoleDeleteResponse>(status::ROLE_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/RoleGrantPermission", |_, _: pb::AuthRoleGrantPermissionRequest| {
        refuse::<pb::AuthRoleGrantPermissionResponse>(status::ROLE_NOT_FOUND)
    });
    unary(router, context, "/etcdserverpb.Auth/RoleRevokePermission", |_, _: pb::AuthRoleRevokePermissionRequest| {
        refuse::<pb::AuthRoleRevokePermissionResponse>(status::ROLE_NOT_FOUND)
    });
}

async fn refuse<A>(error: EtcdError) -> Result<A, Status> {
    Err(error.into())
}

async fn add<A>(name: String, if_empty: EtcdError) -> Result<A, Status> {
    if name.is_empty() {
        return Err(if_empty.into());
    }
    Err(Status::unimplemented("tenure: users and roles are not supported yet; keep the server on loopback"))
}

async fn header(context: &Context) -> Result<Option<pb::ResponseHeader>, Status> {
    let revision = context.query(true, |view| view.machine.revision()).await.map_err(failed)?;
    Ok(Some(context.identity.header(revision)))
}

async fn auth_status(context: Context, _: pb::AuthStatusRequest) -> Result<pb::AuthStatusResponse, Status> {
    // The revision of a store of users that was never changed.
    Ok(pb::AuthStatusResponse { header: header(&context).await?, enabled: false, auth_revision: 1 })
}

async fn auth_disable(context: Context, _: pb::AuthDisableRequest) -> Result<pb::AuthDisableResponse, Status> {
    Ok(pb::AuthDisableResponse { header: header(&context).await? })
}

async fn user_list(context: Context, _: pb::AuthUserListRequest) -> Result<pb::AuthUserListResponse, Status> {
    Ok(pb::AuthUserListResponse { header: header(&context).await?, users: Vec::new() })
}

async fn role_list(context: Context, _: pb::AuthRoleListRequest) -> Result<pb::AuthRoleListResponse, Status> {
    Ok(pb::AuthRoleListResponse { header: header(&context).await?, roles: Vec::new() })
}
