"""Every error that S3 or botocore can give has a row that says what it means for an image."""

from __future__ import annotations

import boto3
import botocore.exceptions
import pytest
import urllib3.exceptions
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.parsers import ResponseParserError

from code_worker.errors import CodeWorkerError, ImageRejectedError, SourceCredentialsError, TransientError
from code_worker.images.s3_errors import CODES, EXCEPTIONS, Fault, fault_of_code, fault_of_exception
from code_worker.types import RejectReason

# The general codes and those of tagging and replication in Amazon's "Error responses".
PUBLISHED = set(
    """
    AccessControlListNotSupported AccessDenied AccessPointAlreadyOwnedByYou AccountProblem AllAccessDisabled
    AmbiguousGrantByEmailAddress AuthorizationHeaderMalformed AuthorizationQueryParametersError BadDigest
    BucketAlreadyExists BucketAlreadyOwnedByYou BucketHasAccessPointsAttached BucketNotEmpty ClientTokenConflict
    ConditionalRequestConflict ConnectionClosedByRequester CredentialsNotSupported CrossLocationLoggingProhibited
    DeviceNotActiveError EndpointNotFound EntityTooLarge EntityTooSmall ExpiredToken
    IllegalLocationConstraintException IllegalVersioningConfigurationException IncompleteBody IncorrectEndpoint
    IncorrectNumberOfFilesInPostRequest InlineDataTooLarge InternalError InvalidAccessKeyId InvalidAccessPoint
    InvalidAccessPointAliasError InvalidAddressingHeader InvalidArgument InvalidBucketAclWithObjectOwnership
    InvalidBucketName InvalidBucketOwnerAWSAccountID InvalidBucketState InvalidDigest
    InvalidEncryptionAlgorithmError InvalidHostHeader InvalidHttpMethod InvalidLocationConstraint
    InvalidObjectState InvalidPart InvalidPartOrder InvalidPayer InvalidPolicyDocument InvalidRange InvalidRegion
    InvalidRequest InvalidSecurity InvalidSessionException InvalidSignature InvalidSOAPRequest InvalidStorageClass
    InvalidTag InvalidTargetBucketForLogging InvalidToken InvalidURI KeyTooLongError KMS.DisabledException
    KMS.InvalidKeyUsageException KMS.KMSInvalidStateException KMS.NotFoundException MalformedACLError
    MalformedPOSTRequest MalformedXML MaxMessageLengthExceeded MaxPostPreDataLengthExceededError MetadataTooLarge
    MethodNotAllowed MissingAttachment MissingAuthenticationToken MissingContentLength MissingRequestBodyError
    MissingSecurityElement MissingSecurityHeader NoLoggingStatusForKey NoSuchAccessPoint NoSuchAccessPointPolicy
    NoSuchAsyncRequest NoSuchBucket NoSuchBucketPolicy NoSuchCORSConfiguration NoSuchKey
    NoSuchLifecycleConfiguration NoSuchMultiRegionAccessPoint NoSuchObjectLockConfiguration NoSuchResource
    NoSuchTagSet NoSuchUpload NoSuchVersion NoSuchWebsiteConfiguration NotDeviceOwnerError NotImplemented
    NotModified NotSignedUp ObjectLockConfigurationNotFoundError OperationAborted OwnershipControlsNotFoundError
    PermanentRedirect PreconditionFailed Redirect ReplicationConfigurationNotFoundError
    RequestHeaderSectionTooLarge RequestIsNotMultiPartContent RequestTimeout RequestTimeTooSkewed
    RequestTorrentOfBucketError ResponseInterrupted RestoreAlreadyInProgress
    ServerSideEncryptionConfigurationNotFoundError ServiceUnavailable SignatureDoesNotMatch SlowDown
    TemporaryRedirect TokenCodeInvalidError TokenRefreshRequired TooManyAccessPoints TooManyBuckets
    TooManyMultiRegionAccessPointregionsError TooManyMultiRegionAccessPoints UnauthorizedAccess
    UnauthorizedAccessError UnexpectedContent UnexpectedIPError UnresolvableGrantByEmailAddress
    UnsupportedArgument UnsupportedSignature UserKeyMustBeSpecified
""".split()  # noqa: SIM905 - a hundred quoted words are no list to read
)


def descendants(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind}.union(*(descendants(child) for child in kind.__subclasses__()))


def botocore_classes() -> list[str]:
    found = set().union(*(descendants(kind) for kind in (BotoCoreError, ClientError, HTTPClientError)))
    # Classes that a client builds from codes at run time are ClientErrors: their codes decide.
    return sorted(kind.__name__ for kind in found if kind.__module__ == botocore.exceptions.__name__)


def modelled_codes() -> list[str]:
    client = boto3.session.Session().client("s3", region_name="us-east-1")
    shapes = [client.meta.service_model.shape_for(name) for name in client.meta.service_model.shape_names]
    client.close()
    return sorted(shape.error_code for shape in shapes if shape.metadata.get("exception"))


def test_the_enumeration_sees_the_classes() -> None:
    assert {"ClientError", "ReadTimeoutError", "FlexibleChecksumError"} <= set(botocore_classes())
    assert len(botocore_classes()) > 80


@pytest.mark.parametrize("name", botocore_classes())
def test_every_exception_of_botocore_has_a_row(name: str) -> None:
    assert name in EXCEPTIONS


@pytest.mark.parametrize("code", sorted({*PUBLISHED, *modelled_codes()}))
def test_every_published_and_modelled_code_has_a_row(code: str) -> None:
    assert code in CODES


def test_no_row_is_for_an_exception_that_does_not_exist() -> None:
    others = {ResponseParserError.__name__, urllib3.exceptions.HTTPError.__name__, ValueError.__name__}
    # Rows may be ahead of or behind the installed version by a few, not by a spelling mistake in each.
    unknown = set(EXCEPTIONS) - set(botocore_classes()) - others
    assert len(unknown) <= 5, unknown


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        ("NoSuchKey", ImageRejectedError, "not_found"),
        ("NoSuchVersion", ImageRejectedError, "not_found"),
        ("InvalidObjectName", ImageRejectedError, "not_found"),
        ("AccessDenied", ImageRejectedError, "access_denied"),
        ("InvalidObjectState", ImageRejectedError, "archived"),
        ("PreconditionFailed", ImageRejectedError, "content_changed"),
        ("ExpiredToken", SourceCredentialsError, "fetch_failed"),
        ("InvalidAccessKeyId", SourceCredentialsError, "fetch_failed"),
        ("SignatureDoesNotMatch", SourceCredentialsError, "fetch_failed"),
        ("InvalidToken", SourceCredentialsError, "fetch_failed"),
        ("RequestTimeTooSkewed", SourceCredentialsError, "fetch_failed"),
        ("PermanentRedirect", SourceCredentialsError, "fetch_failed"),
        ("NoSuchBucket", SourceCredentialsError, "fetch_failed"),
        ("InvalidBucketName", SourceCredentialsError, "fetch_failed"),
        ("InvalidArgument", SourceCredentialsError, "fetch_failed"),
        ("NotImplemented", SourceCredentialsError, "fetch_failed"),
        ("SlowDown", TransientError, "fetch_failed"),
        ("InternalError", TransientError, "fetch_failed"),
        ("RequestTimeout", TransientError, "fetch_timeout"),
    ],
)
def test_a_code_means(code: str, kind: type[CodeWorkerError], reason: str) -> None:
    error = fault_of_code(code, None).error("s3://b", "s3://b/k", code)
    assert type(error) is kind
    assert error.reason == reason
    assert str(error).startswith(f"{reason}: s3://b/k: {code}: ")


@pytest.mark.parametrize(
    ("code", "status", "fault"),
    [
        ("404", 404, Fault.NOT_FOUND),
        ("404", None, Fault.NOT_FOUND),
        ("403", 403, Fault.DENIED),
        ("412", 412, Fault.CHANGED),
        ("301", 301, Fault.MISCONFIGURED),
        ("502", 502, Fault.FAILED),
        ("Unheard", 401, Fault.DENIED),
        ("Unheard", 410, Fault.NOT_FOUND),
        ("Unheard", 418, Fault.FAILED),
        ("Unheard", 507, Fault.FAILED),
        ("", None, Fault.FAILED),
        ("²", None, Fault.FAILED),
    ],
)
def test_a_code_without_a_row_is_judged_by_its_status(code: str, status: int | None, fault: Fault) -> None:
    assert code not in CODES
    assert fault_of_code(code, status) is fault


def test_an_exception_without_a_row_takes_its_nearest_base() -> None:
    class LaterTimeoutError(botocore.exceptions.ReadTimeoutError):
        pass

    class LaterError(BotoCoreError):
        pass

    assert fault_of_exception(LaterTimeoutError(endpoint_url="http://x")) is Fault.TIMEOUT
    assert fault_of_exception(LaterError()) is Fault.FAILED
    assert fault_of_exception(urllib3.exceptions.SSLError("x")) is Fault.FAILED


def test_every_fault_names_a_reason_that_fits_its_disposition() -> None:
    for fault in Fault:
        error = fault.error("s3://b", "s3://b/k", "Said")
        assert error.reason in RejectReason
        assert error.reason.retryable is isinstance(error, TransientError)
        if isinstance(error, SourceCredentialsError):
            assert error.source == "s3://b"
