// swift-tools-version: 6.0

import Foundation
import PackageDescription

// Core ML and Core AI exist on Apple's systems only. On Linux stand-ins of those names let the very same files compile
// and run.
#if os(Linux)
let standIns: [Target] = [
    .target(name: "CoreML", dependencies: ["TTTFormats", "TTTReference"], path: "swift/StandIns/CoreML"),
    .target(
        name: "CoreAI", dependencies: ["TTTFormats", "TTTReference"], path: "swift/StandIns/CoreAI",
        swiftSettings: [.enableExperimentalFeature("Lifetimes")]),
]
let coreML: [Target.Dependency] = ["CoreML"]
let coreAI: [Target.Dependency] = ["CoreAI"]
#else
let standIns: [Target] = []
let coreML: [Target.Dependency] = []
let coreAI: [Target.Dependency] = []
#endif

// The copy beside an exported package comes without tests.
let testsPath = "swift/Tests"
let tests: [Target] = FileManager.default.fileExists(atPath: "\(Context.packageDirectory)/\(testsPath)")
    ? [
        .target(name: "TTTTestSupport", dependencies: ["TTTFormats"], path: "\(testsPath)/Support"),
        // What is tried from outside: killed while it saves; how long, how much memory. Tests and people start it.
        .executableTarget(
            name: "TTTTrials", dependencies: ["TTTFormats", "TTTKit", "TTTCommand"], path: "\(testsPath)/Trials"),
        .testTarget(
            name: "TTTReferenceTests", dependencies: ["TTTFormats", "TTTReference", "TTTTestSupport"],
            path: "\(testsPath)/TTTReferenceTests"),
        .testTarget(
            name: "TTTKitTests",
            dependencies: ["TTTKit", "TTTCoreAI", "TTTFormats", "TTTReference", "TTTTestSupport", "TTTTrials"]
                + coreML + coreAI,
            path: "\(testsPath)/TTTKitTests"),
        .testTarget(
            name: "TTTCommandTests", dependencies: ["TTTCommand", "TTTFormats", "TTTKit", "TTTTestSupport"],
            path: "\(testsPath)/TTTCommandTests"),
    ] : []

// What the sample app does, without its views, so that it is tested here. The app compiles these files itself.
let readerPath = "examples/Reader"
let reader: [Target] = FileManager.default.fileExists(atPath: "\(Context.packageDirectory)/\(readerPath)")
    ? [
        .target(name: "ReaderCore", dependencies: ["TTTKit"] + coreML, path: "\(readerPath)/ReaderCore"),
        .testTarget(
            name: "ReaderCoreTests", dependencies: ["ReaderCore", "TTTKit", "TTTFormats", "TTTTestSupport"] + coreML,
            path: "\(readerPath)/ReaderCoreTests"),
    ] : []

let package = Package(
    name: "TTTKit",
    platforms: [.macOS(.v15), .iOS(.v18), .tvOS(.v18), .visionOS(.v2), .watchOS(.v11)],
    products: [
        .library(name: "TTTKit", targets: ["TTTKit"]), .library(name: "TTTCoreAI", targets: ["TTTCoreAI"]),
        .executable(name: "ttt", targets: ["ttt"]),
    ],
    targets: [
        .target(name: "TTTFormats", path: "swift/Sources/TTTFormats"),
        .target(name: "TTTReference", dependencies: ["TTTFormats"], path: "swift/Sources/TTTReference"),
        .target(name: "TTTKit", dependencies: ["TTTFormats"] + coreML, path: "swift/Sources/TTTKit"),
        // By itself, so that what Core AI's first SDKs may change breaks nothing that runs in Core ML.
        .target(name: "TTTCoreAI", dependencies: ["TTTFormats", "TTTKit"] + coreAI, path: "swift/Sources/TTTCoreAI"),
        .target(
            name: "TTTCommand", dependencies: ["TTTCoreAI", "TTTFormats", "TTTKit", "TTTReference"] + coreML + coreAI,
            path: "swift/Sources/TTTCommand"),
        .executableTarget(name: "ttt", dependencies: ["TTTCommand"], path: "swift/Sources/ttt"),
    ] + standIns + tests + reader,
    swiftLanguageModes: [.v6]
)
